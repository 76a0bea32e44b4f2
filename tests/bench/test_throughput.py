"""Benchmarks of whole runs: what they launch can be run, what they measure adds up, what they compare is comparable."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from bench import emulated, throughput
from bench.emulated import CHOSEN, LAUNCH, Run, columns, settings_of, speed_ups
from bench.ideal import Ideal, simulated
from bench.measured import ROOT, SCHEMA, Measured, Use, launch, measure
from bench.profiles import PROFILES
from bench.shaping import BASELINE, KEEP
from bench.throughput import against, names_of, read_results, write
from bench.throughput import settings_of as settings_of_file
from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from launcher.analysis.audit import audit_run

DEADLINE_S = 90.0
EMULATED: dict[str, Any] = {
    "prompts": {"num_train": 64, "held_out": 1},
    "shaping": {"rule": "shortest", "early_stop": True, "launch": 6, "keep": 4},
    "roles": {"generator": {"replicas": 2}},
    "generator": {"engine": "scripted", "num_slots": 8, "script": {"median_tokens": 20.0, "token_latency_s": 0.002}},
    "learner": {"groups_per_step": 2, "steps": 12, "checkpoint_every": 12, "script": {"token_s": 1e-5, "step_s": 0.01}},
    "evaluation": {"samples_per_prompt": 0},
    "telemetry": {"status_every_s": 0.05},
}


def measured(**changes: Any) -> Measured:
    use = Use(busy=0.9, idle=0.1, away=0.0, stages={}, waits={}, loop_lag_max_s=0.01, memory_max_mb=100.0, slots=0.5)
    numbers: dict[str, Any] = {
        "window_s": 10.0,
        "num_steps": 20,
        "num_groups": 40,
        "num_trained": 4000,
        "num_decoded": 5000,
        "staleness_mean": 1.0,
        "staleness_max": 2.0,
        "stalls_s": (0.001, 0.01),
        "cancels_s": (0.002, 0.02),
        "processes": {name: use for name in ("generator/0", "learner/0", "shaper/0", "reward/0")},
        "tokens_by_outcome": {"trained": 4000, "cancelled": 1000},
        "reward": 0.5,
    }
    return Measured(**numbers | changes)


def emulated_run(**changes: Any) -> Run:
    return Run(measured(**changes), Ideal(step_s=0.4, generator_idle=0.02))


@pytest.mark.slow
def test_what_is_measured_of_a_run_adds_up(tmp_path: Path) -> None:
    run_dir = launch(EMULATED, tmp_path)
    assert audit_run(run_dir).findings == []
    found = measure(run_dir, skip_steps=4)
    assert (found.num_steps, found.num_groups) == (5, 10), "12, but for 4 before and 3 after"
    assert found.staleness_max <= 2
    assert 0 < found.num_trained <= sum(found.tokens_by_outcome.values())
    assert 0 < found.num_decoded <= sum(found.tokens_by_outcome.values())
    assert set(found.processes) == {"shaper/0", "learner/0", "reward/0", "generator/0", "generator/1"}
    for use in found.processes.values():
        assert use.busy + use.idle + use.away == pytest.approx(1.0)
        assert use.memory_max_mb > 10
    assert found.cancels_s is not None
    assert 0 < found.cancels_s[0] <= found.cancels_s[1]
    learner = found.processes["learner/0"].stages
    assert learner["step"] * found.window_s > 5 * 0.01, "each step takes the time that the script says"
    assert 0 < found.mean("generator", "slots") <= 1
    with pytest.raises(ConfigError, match="12 steps, of which the first 9 and the last 3"):
        measure(run_dir, skip_steps=9)


@pytest.mark.slow
def test_a_launched_run_ends_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    endless = EMULATED | {"learner": EMULATED["learner"] | {"steps": 100_000}}
    call = f"from pathlib import Path; from bench.measured import launch; launch({endless!r}, Path({str(tmp_path)!r}))"
    bench = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT)
    try:
        wait_until(lambda: any(tmp_path.glob("runs/*/metrics.jsonl")), "it has taken a step")
        processes = psutil.Process(bench.pid).children(recursive=True)
        assert len(processes) > 5, "launcher, keeper, agent and the processes of the run"
    finally:
        bench.kill()
        bench.wait(DEADLINE_S)
    wait_until(lambda: not any(map(is_alive, processes)), "everything has ended")


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.1)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the directory of a finished run"):
        measure(tmp_path, skip_steps=1)


@pytest.mark.parametrize("number", PROFILES)
@pytest.mark.parametrize("arm", CHOSEN)
def test_every_emulated_run_is_a_valid_one(number: int, arm: str) -> None:
    config = RunConfig.model_validate(settings_of(PROFILES[number], 16, "lengths.npz", 256, arm, 10, 0))
    assert config.shaping.launch in (8, 10, LAUNCH)
    assert config.roles.generator.replicas == PROFILES[number].num_generators


def test_an_emulated_second_and_token_stand_for_as_many_real_ones() -> None:
    profile = PROFILES[8]
    row = columns(profile, "math", emulated_run(), measured(window_s=20.0))
    assert row["s / step"][0] == 10.0 * 16 / 20
    assert row["speed-up per group"][0] == 2.0
    assert row["decoded, tokens/s"][0] == 500.0, "16 times the tokens in 16 times the seconds"
    assert row["simulated"][0] == 0.4 * 16
    cells = {(8, "math", BASELINE): [emulated_run(window_s=20.0)], (8, "math", "shortest"): [emulated_run()]}
    assert speed_ups(cells) == {"math, 8": {BASELINE: [1.0], "shortest": [2.0]}}


def test_a_schedule_by_itself_takes_what_its_samples_do(tmp_path: Path) -> None:
    """One prompt, whose samples are all as long: a step is decoding, training, updating and nothing else."""
    np.savez(tmp_path / "lengths.npz", lengths=np.full((4, 16), 100, np.int64))
    settings = settings_of(PROFILES[8], 16, str(tmp_path / "lengths.npz"), 256, BASELINE, 6, 0)
    settings["learner"] |= {"groups_per_step": 1}
    settings["roles"]["generator"]["replicas"] = 1
    script, learner = settings["generator"]["script"], settings["learner"]["script"]
    found = simulated(settings, 2, 3)
    decoding_s = 100 * script["token_latency_s"] * (1 + KEEP / script["batch_for_double_latency"])
    training_s = 8 * 100 * learner["token_s"] + learner["step_s"] + learner["broadcast_s"] + script["update_stall_s"]
    assert found.step_s == pytest.approx(decoding_s + training_s, rel=0.01)
    idle_s = training_s - script["update_stall_s"]
    assert found.generator_idle == pytest.approx(idle_s / found.step_s, rel=0.02)


def test_emulated_runs_that_are_there_are_taken_over_and_others_refused(tmp_path: Path) -> None:
    asked = argparse.Namespace(out=tmp_path, resume=True, steps=30, seeds=[0])
    cells = {(8, "math", BASELINE): [emulated_run(window_s=20.0)], (8, "math", "shortest"): [emulated_run()]}
    assert emulated.resumed(asked) == ({}, [])
    emulated.write(asked, "", cells, ["abc"])
    assert emulated.resumed(asked) == (cells, ["abc"])
    with pytest.raises(ConfigError, match=r"holds runs of --steps 30 --seeds \[0\]"):
        emulated.resumed(argparse.Namespace(out=tmp_path, resume=True, steps=30, seeds=[1]))
    more = argparse.Namespace(out=tmp_path, resume=True, steps=30, seeds=[0, 1])
    assert emulated.resumed(more) == (cells, ["abc"]), "another seed can be added"
    (tmp_path / "emulated.json").write_text("[]")
    with pytest.raises(ConfigError, match="move it away"):
        emulated.resumed(asked)
    with pytest.raises(ConfigError, match="give --out too"):
        emulated.resumed(argparse.Namespace(out=None, resume=True, steps=30, seeds=[0]))


def test_a_rate_below_the_baseline_is_found(tmp_path: Path) -> None:
    write(tmp_path, "", {"one": [measured()] * 3})
    baseline = read_results(tmp_path / "throughput.json")
    assert baseline == {"one": [measured()] * 3}
    lowest, *others = against({"one": [measured(num_trained=3500)]}, baseline)
    assert lowest == (pytest.approx(0.875), "one: tokens/s trained 350, 0.88 of the baseline's 400")
    assert [ratio for ratio, _ in others] == [1.0, 1.0]
    with pytest.raises(ConfigError, match="the baseline is of one, and this is of other"):
        against({"other": [measured()]}, baseline)


@pytest.mark.parametrize(("num_trained", "code"), [(3700, 0), (3500, 1)])
def test_a_regression_ends_with_exit_code_1_and_is_named(
    num_trained: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "", {"one": [measured()]})
    monkeypatch.setattr(throughput, "run", lambda _: {"one": [measured(num_trained=num_trained, cancels_s=None)]})
    monkeypatch.setattr("sys.argv", ["throughput", "one.yaml", "--baseline", str(tmp_path / "throughput.json")])
    with pytest.raises(SystemExit) as ended:
        throughput.main()
    printed = capsys.readouterr()
    assert ended.value.code == code
    assert "cancel to freed slot, median, ms | - |" in printed.out
    assert printed.err.count("of the baseline's") == 3
    assert ("baseline's 400: below 0.9" in printed.err) == bool(code)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting property name"),
        ("[]", "it names no schema"),
        (
            json.dumps({"schema": SCHEMA + 1}),
            f"of schema {SCHEMA} .*: it is of schema {SCHEMA + 1}; move it",
        ),
        (json.dumps({"schema": SCHEMA}), "missing required field `runs`"),
        (json.dumps({"schema": SCHEMA, "runs": {"one": [{"window_s": "long"}]}}), "Expected `float`, got `str`"),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "throughput.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=why):
        read_results(path)


def test_a_cluster_is_run_for_the_steps_that_were_asked_for_and_only_if_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "a" / "cluster.yaml"
    path.parent.mkdir()
    path.write_text("learner: {groups_per_step: 3}\n")
    assert settings_of_file(path, 7) == {"learner": {"groups_per_step": 3, "steps": 7}}
    path.write_text("learner: {groups_per_step: none}\n")
    with pytest.raises(ConfigError, match="groups_per_step"):
        settings_of_file(path, 7)
    assert names_of([path, tmp_path / "b.yaml"]) == ["cluster", "b"]
    assert names_of([path, tmp_path / "cluster.yaml"]) == [str(path.with_suffix("")), str(tmp_path / "cluster")]


def test_a_run_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exit code 2"):
        launch({"learner": {"steps": -1}}, tmp_path)


def test_measured_numbers_survive_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(measured()), type=Measured) == measured()
