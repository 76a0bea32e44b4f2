"""Rollouts of real runs: what is on the disk is what the ledger says, whatever dies."""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from darts_async.protocol import group_id_of
from darts_async.rollouts import Rollout, read_rollouts, rollout_files
from darts_async.shaper.ledger import SampleEnded, read_ledger
from tests.support.launched import LaunchedRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FAST = {"restart": {"backoff": {"initial_s": 0.1, "max_s": 1.0}, "intensity": {"max": 50}}}


def settings(steps: int, **sections: Any) -> dict[str, Any]:
    return {
        "roles": {"shaper": FAST, "generator": {"replicas": 2} | FAST},
        "learner": {"steps": steps, "checkpoint_every": 5},
        "evaluation": {"every_steps": 5},
        "telemetry": {"sample_groups": 3, "status_every_s": 0.1} | sections,
    }


def rollouts_of(run: LaunchedRun, kind: str) -> dict[int, list[Rollout]]:
    files = rollout_files(run.run_dir / "samples", kind)  # type: ignore[arg-type]
    return {number: read_rollouts(path) for number, path in files.items()}


def assert_as_in_the_ledger(run: LaunchedRun, steps: int) -> dict[int, list[Rollout]]:
    """Each step has a file, no sample is in two, and each is as the ledger has it. Returns those of the steps."""
    ended = {e.sample_id: e for e in read_ledger(run.run_dir / "ledger.msgpack") if isinstance(e, SampleEnded)}
    by_step, evaluated = rollouts_of(run, "train"), rollouts_of(run, "held-out")
    assert by_step.keys() >= set(range(steps))
    counts = Counter(rollout.sample for each in (by_step, evaluated) for some in each.values() for rollout in some)
    assert set(counts.values()) == {1}, "doubled"
    num_samples = Counter(group_id_of(sample_id) for sample_id in ended)
    for number, some in by_step.items():
        assert {
            size for group, size in Counter(r.group_id for r in some).items() if size != num_samples[group]
        } == set()
        for rollout in some:
            end = ended[rollout.group_id * 4096 + rollout.sample_index]
            assert (rollout.outcome, rollout.why, rollout.length) == (end.outcome, end.reason, end.num_tokens)
            assert end.step in (None, number)
            assert rollout.length == len(rollout.token_ids) == len(rollout.logprobs) == len(rollout.versions)
            assert rollout.versions == sorted(rollout.versions)
            assert (rollout.oldest_version, rollout.newest_version) == (end.oldest_version, end.newest_version)
    assert all({r.outcome for r in some} == {"evaluated"} for some in evaluated.values())
    assert not list((run.run_dir / "samples").glob("*.new")), "torn"
    return by_step


def test_a_shaper_that_is_killed_again_and_again_doubles_and_tears_nothing(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=24)) as run:
        for number in (3, 8, 13, 18):
            run.wait_for_steps(number)
            killed = run.kill("shaper/0", signal.SIGKILL)
            run.wait_for_service("shaper/0", killed + 1)
        assert run.end() == 0, run.output
        run.assert_clean()
        by_step = assert_as_in_the_ledger(run, 24)
        assert rollouts_of(run, "held-out").keys() >= {0, 24}
        trained = [rollout for step in range(24) for rollout in by_step[step] if rollout.outcome == "trained"]
        assert len(trained) >= 24 * 3 * 4 * 0.9
        assert all(rollout.selected and rollout.advantage is not None for rollout in trained)
        shown = run.verb("samples", str(run.run_dir), "--step", "9", "--best", "--json", "-n", "1")
        assert json.loads(shown.stdout)["step"] == 9, shown.stderr


def test_a_run_that_is_resumed_writes_its_steps_again_and_none_that_never_was(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=16)) as run:
        run.wait_for_steps(8)
        run.kill_all()
        late = run.run_dir / "samples" / "train-000999.jsonl.gz"
        late.write_bytes(b"of a step that was undone")
        run.resume("--from-checkpoint")
        assert run.end() == 0, run.output
        run.assert_clean()
        assert not late.exists()
        assert_as_in_the_ledger(run, 16)


def test_a_live_run_shows_its_samples_and_stays_within_its_limit(tmp_path: Path) -> None:
    some = settings(steps=400, samples_max_mb=0.1) | {
        "evaluation": {}
    }  # one before, so that it does not fill the limit
    with LaunchedRun(tmp_path, "scripted.yaml", some) as run:
        run.wait_for_steps(20)
        shown = run.verb("samples", "--worst")
        assert shown.returncode == 0, shown.stderr
        assert "reward" in shown.stdout
        run.wait_until(lambda: 0 not in rollout_files(run.run_dir / "samples", "train"))
        assert sum(path.stat().st_size for path in (run.run_dir / "samples").iterdir()) <= 100_000
        assert 0 in rollout_files(run.run_dir / "samples", "held-out"), "evaluations go last"
        assert run.verb("down").returncode == 0
        run.end()
        run.assert_clean()


def test_with_no_samples_asked_for_none_are_there(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=3, sample_groups=0)) as run:
        assert run.end() == 0, run.output
        assert not (run.run_dir / "samples").exists()
        shown = run.verb("samples", str(run.run_dir))
        assert (shown.returncode, "telemetry.sample_groups is 0" in shown.stderr) == (2, True)
