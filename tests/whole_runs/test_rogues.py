"""Processes with valid keys that talk nonsense to live ones: named, restarted, and the run ends as if they had died."""

import asyncio
import io
import json
import sys
from functools import partial
from pathlib import Path

import msgspec
import pytest
import yaml
from rich.console import Console

from darts_async.config import RunConfig
from darts_async.topology.plan import RunPlan
from darts_async.topology.run_files import KEYS_DIR
from darts_async.transport import create_run_keys
from launcher.display.view import PlainDisplay
from launcher.lifecycle.lifecycle import Limits, Outcome
from launcher.plan.plan import link_addresses, plan_run
from launcher.preflight.preflight import link_ports
from launcher.run.links import open_control
from launcher.run.run import run
from launcher.run_dir.run_dir import create_run_dir, write_inputs
from tests.support.launched import CONFIGS, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LIES = {
    "generator/1": ("future_weights", "WeightsApplied: version 1099511627776, and the groups that were shipped"),
    "generator/2": ("surplus_frame", "1 array frames, of which the header uses 0"),
    "generator/3": ("future_member", "MemberJoined: it holds version 1099511627776, and none after"),
    "generator/4": ("end_of_run", "RunFinished: a RunFinished, which is not for a generator to say"),
    "reward/1": ("nan", "SampleScored: a reward of nan for sample 0"),
}


def with_rogues(plan: RunPlan) -> RunPlan:
    specs = [
        msgspec.structs.replace(
            spec,
            argv=(sys.executable, "-m", "tests.fakes.rogue", *spec.argv[5:]),
            env={**spec.env, "PYTHONPATH": str(ROOT), "LIE": LIES[spec.name][0]},
        )
        if spec.name in LIES
        else spec
        for spec in plan.processes
    ]
    return msgspec.structs.replace(plan, processes=tuple(specs))


def test_rogues_with_keys_are_named_and_restarted_and_the_run_ends_well(tmp_path: Path) -> None:
    settings = yaml.safe_load((CONFIGS / "scripted.yaml").read_text())
    settings["runs_dir"] = str(tmp_path)
    settings["roles"] = {"generator": {"replicas": 5}, "reward": {"replicas": 2}}
    settings["learner"]["steps"] = 30
    config = RunConfig.model_validate(settings)
    run_dir = create_run_dir(config)
    plan = with_rogues(plan_run(config, run_dir, link_addresses("127.0.0.1", link_ports(config))))
    write_inputs(run_dir, config, plan)
    create_run_keys(run_dir / KEYS_DIR, plan.endpoints())
    output = io.StringIO()
    display = PlainDisplay(Console(file=output, width=250))
    control = partial(open_control, plan, run_dir, config.transport)
    outcome, summary = asyncio.run(
        run(config, plan, run_dir, open_control=control, display=display, limits=Limits(stop_s=20.0))
    )
    assert outcome == Outcome("finished", "finished"), output.getvalue()
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    for name, (_, words) in LIES.items():
        assert f"{name} is refused and killed: " in output.getvalue()
        assert words in output.getvalue(), output.getvalue()
        kills = [event for event in events if event["type"] == "refused" and event["process"] == name]
        assert [event["incarnation"] for event in kills] == [1]
    started = [(event["process"], event["incarnation"]) for event in events if event["type"] == "started"]
    assert sorted(started) == sorted([(spec.name, 1) for spec in plan.processes] + [(name, 2) for name in LIES]), (
        "only those that lied have died"
    )
    assert summary.tokens is not None
    assert summary.tokens.balanced
