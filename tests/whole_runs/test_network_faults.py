"""Networks that lose, delay, repeat, reorder and cut, and collectives in which somebody hangs, in live runs."""

import signal
from pathlib import Path
from typing import Any

import pytest

from darts_async.shaper.ledger import VersionSeen, read_ledger
from darts_async.topology.run_files import LEDGER_FILE
from tests.support.launched import LaunchedRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FAST = {"backoff": {"initial_s": 0.1, "max_s": 1.0}, "intensity": {"max": 50}, "silent_after_s": 4.0}


def settings(steps: int, **sections: Any) -> dict[str, Any]:
    role = {"replicas": 2, "restart": FAST}
    return {
        "roles": {"generator": role, "reward": role, "learner": {"restart": FAST | {"silent_after_s": 6.0}}},
        "learner": {"steps": steps, "checkpoint_every": 10},
        "telemetry": {"status_every_s": 0.1},
        **sections,
    }


def test_a_run_on_a_network_that_loses_delays_repeats_reorders_and_is_cut_loses_nothing(tmp_path: Path) -> None:
    faults = "drop *:0.05, delay *:0.05:0.3, duplicate *:0.1, reorder *:0.05, cut generators:14:3@generator/1"
    quick = {"heartbeat_s": 0.4, "dead_after_s": 1.6, "resend_after_s": 0.3}
    with LaunchedRun(tmp_path, "scripted.yaml", settings(40, transport=quick), faults) as run:
        assert run.end() == 0, run.output
        summary = run.assert_clean()
        assert summary["num_steps"] == 40
        refused = [log for log in run.run_dir.glob("logs/*.jsonl") if "link_faults" in log.read_text()]
        assert len(refused) >= 6, "every process has said that its links are faulty"


def test_who_hangs_or_fails_in_a_collective_holds_nobody_beyond_the_deadline(tmp_path: Path) -> None:
    """One after the other: a member fails, a member hangs as a whole, a member's thread hangs, the learner fails, and
    the learner hangs while it sends."""
    faults = (
        "fail generator.bucket:3@generator/0, freeze generator.bucket:6@generator/1, "
        "stall generator.bucket:9@generator/0, fail learner.bucket:14, stall learner.bucket:24"
    )
    quick = {"deadline_s": 1.5, "bucket_bytes": 1 << 20}
    with LaunchedRun(tmp_path, "scripted.yaml", settings(30, weights=quick), faults) as run:
        assert run.end() == 0, run.output
        run.assert_clean()
        versions = [r.policy_version for r in read_ledger(run.run_dir / LEDGER_FILE) if isinstance(r, VersionSeen)]
        assert set(versions) == set(range(31)), "none was skipped"
        killed = {event["process"] for event in run.events("hangs")}
        assert "generator/1" in killed, "frozen"
        logs = "".join(path.read_text() for path in run.run_dir.glob("logs/*.jsonl"))
        assert "generator.bucket fails on purpose" in logs
        assert "learner.bucket fails on purpose" in logs
        assert "than 1.5 s" in logs, "somebody was too late"
        assert all(event["code"] in (0, 1, -signal.SIGKILL) for event in run.events("ended"))
