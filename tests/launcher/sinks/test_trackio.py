"""The real trackio: what its database has, also after kills."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.launcher.sinks.world import BEGAN_S, EVALUATIONS, HISTORY, STEP_REWARDS, FollowedRun

pytestmark = pytest.mark.slow

READ = """
import json, sys, trackio
from trackio.cli import main
(run,) = trackio.Api().runs("arithmetic")
assert (run.name, run.config["name"], "nodes" in run.config) == ("arithmetic", "run", False), run
sys.argv = "trackio get metric --project arithmetic --run arithmetic --metric reward/mean --json".split()
main()
"""


def test_the_database_has_each_line_once_after_kills(tmp_path: Path) -> None:
    with FollowedRun(tmp_path, "trackio", {"trackio": {"project": "arithmetic"}}) as run:
        run.follow_with_a_kill()
        with closing(sqlite3.connect(tmp_path / "trackio" / "arithmetic.db")) as database:
            rows = database.execute("SELECT run_name, step, metrics, timestamp FROM metrics ORDER BY id").fetchall()
        shown = run.read_back(READ)
    assert len(rows) == sum(line["type"] != "resumed" for line in HISTORY)
    assert {name for name, *_ in rows} == {"arithmetic"}
    measured = [(step, json.loads(metrics)) for _, step, metrics, _ in rows]
    assert [(step, row["reward/mean"]) for step, row in measured if "reward/mean" in row] == STEP_REWARDS
    name = "evaluation/reward/mean"
    assert [(step, row[name]) for step, row in measured if name in row] == EVALUATIONS
    assert rows[0][3].startswith("2026-09-21T"), f"the time at which it was measured, {BEGAN_S:.0f}"
    assert [(row["step"], row["value"]) for row in shown["values"]] == STEP_REWARDS, "as its own interface says"
