"""Directories of programs: what is in them is measured, and those without a worker are removed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from darts_async.reward.sandbox import directory
from darts_async.reward.sandbox.directory import bytes_in, own_directory, remove_orphans


def test_small_files_count_too_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "large").write_bytes(b"x" * 100_000)
    (tmp_path / "up").symlink_to("/usr")
    assert 100_000 <= bytes_in(tmp_path, 1 << 30) < 200_000
    for number in range(100):
        (tmp_path / "inner" / str(number)).touch()
    assert bytes_in(tmp_path, 1 << 30) >= 100_000 + 100 * 4096


def test_the_measurement_ends_when_there_is_enough(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / str(number)).touch()
    assert 10_000 < bytes_in(tmp_path, 10_000) < 20_000


def test_what_cannot_be_measured_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: str) -> Iterator[object]:
        raise PermissionError(path)

    monkeypatch.setattr(directory.os, "scandir", closed)
    assert bytes_in(tmp_path, 10_000) == float("inf")


def test_a_directory_that_has_gone_has_nothing(tmp_path: Path) -> None:
    assert bytes_in(tmp_path / "gone", 10_000) == 0


def test_directories_without_a_worker_are_removed_and_no_others(tmp_path: Path) -> None:
    left, fresh, other = (tmp_path / name for name in ("darts-sandbox-left", "darts-sandbox-fresh", "other"))
    for path in (left, fresh, other):
        path.mkdir()
        (path / "file").touch()
    (tmp_path / "darts-sandbox-link").symlink_to(other)
    with own_directory(str(tmp_path)) as used:
        for path in (used, left, other):
            os.utime(path, (0, 0))
        assert remove_orphans([str(tmp_path), str(tmp_path)]) == 1
        assert used.exists()
    assert not used.exists()
    assert not left.exists()
    assert (fresh / "file").exists()
    assert (other / "file").exists()
