"""Files of a run that grow while it goes on."""

import os
from pathlib import Path

import pytest

from launcher.run_dir.json_lines import flushed


async def test_what_was_appended_is_on_the_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushes.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    async with flushed(tmp_path / "metrics", tmp_path / "events", tmp_path / "not there yet"):
        (tmp_path / "metrics").write_text("a")
        (tmp_path / "events").write_text("b")
    assert flushes == ["metrics", "events"]
