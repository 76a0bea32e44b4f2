"""Processes with valid keys that talk nonsense to live ones: named, restarted, and the run ends as if they had died."""

import asyncio
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from rich.console import Console

from darts_async.config import RunConfig
from darts_async.topology.plan import RunPlan
from darts_async.topology.run_files import KEYS_DIR
from darts_async.transport import create_run_keys
from launcher.analysis.audit import audit_run
from launcher.display.view import PlainDisplay
from launcher.lifecycle.lifecycle import Limits, RunOutcome
from launcher.plan.plan import link_addresses, plan_run
from launcher.preflight.preflight import link_ports
from launcher.run_dir.run_dir import create_run_dir, write_inputs
from tests.launcher.run.test_run import run_caught
from tests.support.launched import CONFIGS, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LIES = {
    "generator/1": ("future_weights", "WeightsApplied: version 1099511627776, and the groups that were shipped"),
    "generator/2": ("surplus_frame", "1 array frames, of which the header uses 0"),
    "generator/3": ("future_member", "MemberJoined: it holds version 1099511627776, and none after"),
    "generator/4": ("end_of_run", "RunFinished: a RunFinished, which a generator does not send"),
    "reward/1": ("nan", "SampleScored: a reward of nan for sample 0"),
}
LIES_OF_SHAPER = {
    "no_sample": "Generate: sample -1 (says generator/",
    "no_tokens": "Score: token ids -1 to -1 are outside the vocabulary",
    "future_step": "TrainGroup: group 0: step 1099511627776 of 30 (says learner/0)",
    "future_metrics": "StepCompleted: step 1099511627776 of 30",
}


def with_rogues(plan: RunPlan, lies: Mapping[str, str]) -> RunPlan:
    specs = [
        msgspec.structs.replace(
            spec,
            argv=(sys.executable, "-m", "tests.fakes.rogue", *spec.argv[5:]),
            env={**spec.env, "PYTHONPATH": str(ROOT), "LIE": lies[spec.name]},
        )
        if spec.name in lies
        else spec
        for spec in plan.processes
    ]
    return msgspec.structs.replace(plan, processes=tuple(specs))


class Told:
    """A run with rogues that was carried out: what it has said and come to."""

    def __init__(self, tmp_path: Path, roles: dict[str, Any], lies: Mapping[str, str]) -> None:
        settings = yaml.safe_load((CONFIGS / "scripted.yaml").read_text())
        settings["runs_dir"] = str(tmp_path)
        settings["roles"] = roles
        settings["learner"]["steps"] = 30
        config = RunConfig.model_validate(settings)
        self.run_dir = create_run_dir(config)
        plan = with_rogues(plan_run(config, self.run_dir, link_addresses("127.0.0.1", link_ports(config))), lies)
        self.names = [spec.name for spec in plan.processes]
        write_inputs(self.run_dir, config, plan)
        create_run_keys(self.run_dir / KEYS_DIR, plan.endpoints())
        output = io.StringIO()
        display = PlainDisplay(Console(file=output, width=250))
        outcome, self.summary = asyncio.run(run_caught(config, plan, self.run_dir, display, Limits(stop_s=20.0)))
        self.output = output.getvalue()
        assert outcome == RunOutcome("finished", "finished"), self.output
        assert self.summary.tokens is not None
        assert self.summary.tokens.balanced
        assert audit_run(self.run_dir).findings == []

    def events(self, kind: str) -> list[tuple[str, int]]:
        """(process, incarnation) of each event of a kind."""
        events = map(json.loads, (self.run_dir / "events.jsonl").read_text().splitlines())
        return [(event["process"], event["incarnation"]) for event in events if event["type"] == kind]


def test_rogues_with_keys_are_named_and_restarted_and_the_run_ends_well(tmp_path: Path) -> None:
    roles = {"generator": {"replicas": 5}, "reward": {"replicas": 2}}
    told = Told(tmp_path, roles, {name: lie for name, (lie, _) in LIES.items()})
    for name, (_, words) in LIES.items():
        assert f"{name} is refused and killed: " in told.output
        assert words in told.output, told.output
    assert sorted(told.events("refused")) == sorted((name, 1) for name in LIES)
    expected = [(name, 1) for name in told.names] + [(name, 2) for name in LIES]
    assert sorted(told.events("started")) == sorted(expected), "only those that lied have died"


def test_a_shaper_that_lies_to_each_of_its_peers_is_named_and_restarted_and_the_run_ends_well(tmp_path: Path) -> None:
    roles = {"generator": {"replicas": 3}, "shaper": {"restart": {"backoff": {"initial_s": 0.1, "max_s": 0.1}}}}
    told = Told(tmp_path, roles, {"shaper/0": ",".join(LIES_OF_SHAPER)})
    for words in LIES_OF_SHAPER.values():
        assert f"shaper/0 is refused and killed: {words}" in told.output, told.output
    lives = list(range(1, len(LIES_OF_SHAPER) + 1))
    assert [life for name, life in told.events("refused") if name == "shaper/0"] == lives
    accusers = [name for name, _ in told.events("refused") if name != "shaper/0"]
    assert len(accusers) == 2, "the first generator, and the reward process, whose word is that of one alone"
