"""The shaping benchmark: its arms, its table, and what it says when something is missing."""

import importlib.util
import sys
from pathlib import Path

import pytest

from bench import shaping
from bench.shaping_plots import require_matplotlib
from darts_async.errors import ConfigError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["shaping", *arguments])
    shaping.main()


@pytest.mark.parametrize("arm", shaping.ARMS)
def test_every_arm_is_a_valid_run(arm: str) -> None:
    launch = shaping.ARMS[arm].launch or 12
    assert shaping.ARMS[arm].config(launch, 4096, 64, 0).shaping.launch == launch


@pytest.mark.slow
def test_the_table_has_a_row_for_the_baseline_and_for_each_arm_and_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--workloads", "fixed", "--arms", "survivor", "qlpo", "--launch", "10", "12", "--groups", "32")
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        ["| synchronous", "8"],
        *[[f"| {arm}", r] for arm in ("survivor", "qlpo") for r in ("10", "12")],
    ]


def test_without_matplotlib_plots_are_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"darts-async\[bench\]"):
        require_matplotlib()


def test_a_trace_that_is_not_there_ends_the_command_with_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"error: .*none\.npz"):
        run(monkeypatch, "--trace", str(tmp_path / "none.npz"), "--workloads")
