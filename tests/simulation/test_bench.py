"""The shaping benchmark: its arms, its table, and what it says when something is missing."""

import importlib.util
import sys
from pathlib import Path

import pytest

from bench import shaper, shaping
from darts_async.shaper.ledger import LedgerWriter
from darts_async.simulation.demand import LognormalWorkload
from darts_async.simulation.report import SimulationResult
from darts_async.simulation.run import simulate


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["shaping", *arguments])
    shaping.main()


@pytest.mark.parametrize("arm", shaping.ARMS)
def test_every_arm_is_a_valid_run(arm: str) -> None:
    launch = shaping.ARMS[arm].launch or 12
    assert shaping.ARMS[arm].config(launch, 4096, 64, 0).shaping.launch == launch


@pytest.mark.slow
@pytest.mark.parametrize("arm", [name for name, arm in shaping.ARMS.items() if arm.launch is None])
def test_with_as_many_launched_as_kept_an_arm_is_the_very_same_run_as_its_baseline(arm: str) -> None:
    def result(name: str) -> SimulationResult:
        config = shaping.ARMS[name].config(shaping.KEEP, 4096, 64, 0)
        return simulate(config, LognormalWorkload(), shaping.ARMS[name].models(), num_prompts=40)

    assert result(arm) == result(shaping.plain(arm))


@pytest.mark.slow
def test_the_table_has_a_row_for_the_baseline_and_for_each_arm_and_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ("--workloads", "fixed", "--arms", "survivor", "qlpo", "--launch", "10", "12")
    run(monkeypatch, *arms, "--groups", "32", "--seeds", "0", "1", "2")
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        ["| synchronous", "8"],
        *[[f"| {arm}", r] for arm in ("survivor", "qlpo") for r in ("10", "12")],
    ]


def test_without_matplotlib_plots_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--out", "somewhere")
    assert "argument --out: plots need matplotlib" in capsys.readouterr().err


def test_a_trace_that_is_not_there_ends_the_command_with_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"error: .*none\.npz"):
        run(monkeypatch, "--trace", str(tmp_path / "none.npz"), "--workloads")


@pytest.mark.slow
def test_the_state_machine_is_driven_in_a_steady_state_that_is_valid(tmp_path: Path) -> None:
    ledger = LedgerWriter(tmp_path / "ledger")
    cluster = shaper.Cluster(200, ledger)
    for _ in range(6000):
        cluster.beat()
        assert cluster.num_in_flight <= 200
    cluster.state.validate()
    assert cluster.num_in_flight > 150
    assert cluster.state.num_steps > 1
    assert cluster.state.work.totals.num_tokens_received == cluster.num_tokens
    ledger.close()


@pytest.mark.slow
def test_the_rate_of_the_simulator_and_of_the_state_machine_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--steps", "1", "--repeats", "1", "--in-flight", "100", "--seconds", "0.05", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["shaper", *options])
    shaper.main()
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "shaper.md").read_text()
    cells = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [row[1] for row in cells if row[0] == "| math"] == ["dual_end, R = 10", "survivor, R = 12", "darts, R = 12"]
    assert float(cells[-1][-1].rstrip(" |")) > 0
