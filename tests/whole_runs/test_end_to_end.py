"""Whole runs of real processes through `darts-launch`, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from darts_async.shaper.ledger import GroupDropped, GroupOpened, SampleEnded, read_ledger
from launcher.config_file import load_config
from tests import ROOT

CONFIGS = ROOT / "launcher" / "configs"
DEADLINE_S = 280

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass
class EndedRun:
    """What a run left behind."""

    code: int
    output: str
    run_dir: Path

    def read(self, name: str) -> Any:
        return json.loads((self.run_dir / name).read_text())

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]


def config_file(tmp_path: Path, base: str, **sections: dict[str, Any]) -> Path:
    settings = yaml.safe_load((CONFIGS / base).read_text())
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def launch(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launcher", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=config.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def ended(process: subprocess.Popen[str], config: Path) -> EndedRun:
    output, _ = process.communicate(timeout=DEADLINE_S)
    (run_dir,) = (config.parent / "runs").iterdir()
    return EndedRun(process.returncode, output, run_dir)


def wait_for_step(config: Path, step: int) -> Path:
    """Until the run has taken so many steps; returns its directory."""
    for _ in range(DEADLINE_S * 10):
        for path in (config.parent / "runs").glob("*/metrics.jsonl"):
            if len(path.read_text().splitlines()) > step:
                return path.parent
        time.sleep(0.1)
    raise AssertionError(f"no step {step} within {DEADLINE_S} s")


def assert_no_process_is_left(run_dir: Path) -> None:
    for pid in recorded_pids(run_dir).values():
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, pid


def recorded_pids(run_dir: Path) -> dict[str, int]:
    started = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return {event["process"]: event["pid"] for event in started if event["type"] == "started"}


def check_ledger(run: EndedRun, config: Path) -> None:
    """Every sample ended once, nothing over-stale was trained, and the tokens of the ledger are those reported."""
    settings = load_config(config)
    records = list(read_ledger(run.run_dir / "ledger.msgpack"))
    opened = [r for r in records if isinstance(r, GroupOpened)]
    endings = [r for r in records if isinstance(r, SampleEnded)]
    assert Counter(r.sample_id for r in endings).most_common(1)[0][1] == 1
    assert len(endings) == sum(group.num_samples for group in opened)
    for record in endings:
        if record.outcome == "trained":
            assert record.step is not None
            assert record.oldest_version is not None
            assert 0 <= record.step - record.oldest_version <= settings.staleness.max_staleness
    trained = Counter(r.step for r in endings if r.outcome == "trained")
    if run.read("state.json")["status"] == "finished":
        per_step = settings.learner.groups_per_step * settings.shaping.keep
        assert trained == dict.fromkeys(range(settings.learner.steps), per_step)
    tokens = Counter[str]()
    for record in endings:
        tokens[record.outcome] += record.num_tokens
    account = run.read("summary.json")["tokens"]
    reported = account["by_outcome"] | {"evaluated": account["evaluated"]}
    assert {outcome: n for outcome, n in reported.items() if n} == {outcome: n for outcome, n in tokens.items() if n}
    assert sum(tokens.values()) == account["decoded"], "the engines' own count"


def test_the_quickstart_learns_and_everything_adds_up(tmp_path: Path) -> None:
    config = config_file(
        tmp_path, "quickstart.yaml", learner={"steps": 40, "checkpoint_every": 20}, prompts={"held_out": 64}
    )
    run = ended(launch(config), config)
    assert run.code == 0, run.output
    assert run.read("state.json")["status"] == "finished"
    check_ledger(run, config)
    assert_no_process_is_left(run.run_dir)

    before, after = (line for line in run.metrics() if line["type"] == "evaluation")
    gain = sum(after["rewards"]) / len(after["rewards"]) - sum(before["rewards"]) / len(before["rewards"])
    assert gain > 0.1, "the fixed seed brought .25 and more when this was written"

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run.run_dir / "model")
    assert model.num_parameters() > 0
    assert AutoTokenizer.from_pretrained(run.run_dir / "model").vocab_size > 0
    assert sorted(p.name for p in (run.run_dir / "checkpoints").iterdir()) == ["step-000020", "step-000040"]


@pytest.mark.parametrize(
    ("shaping", "max_staleness"),
    [
        ({"rule": "survivor", "launch": 8}, 1),
        ({"rule": "dual_end", "launch": 6, "early_stop": True}, 3),
        ({"rule": "none", "launch": 4}, 0),
    ],
    ids=["survivor", "early stop", "synchronous"],
)
def test_a_scripted_run_adds_up(tmp_path: Path, shaping: dict[str, Any], max_staleness: int) -> None:
    config = config_file(tmp_path, "scripted.yaml", shaping=shaping, staleness={"max_staleness": max_staleness})
    run = ended(launch(config), config)
    assert run.code == 0, run.output
    check_ledger(run, config)
    assert_no_process_is_left(run.run_dir)
    outcomes = run.read("summary.json")["tokens"]["by_outcome"]
    assert (outcomes["cancelled"] > 0) == (shaping["rule"] != "none")


def test_what_qwen3_recommends_for_sampling_trains_without_a_clipped_token(tmp_path: Path) -> None:
    """Synchronous gspo, the loss whose clips are narrowest: of whole log-probabilities it clipped every failure."""
    config = config_file(
        tmp_path,
        "quickstart.yaml",
        sampling={"top_k": 20, "top_p": 0.95},
        staleness={"max_staleness": 0},
        learner={"steps": 2, "loss": {"kind": "gspo"}},
        prompts={"held_out": 4},
    )
    run = ended(launch(config), config)
    assert run.code == 0, run.output
    steps = [line for line in run.metrics() if "learner/clip_share_low" in line]
    assert [line["step"] for line in steps] == [0, 1]
    for line in steps:
        assert line["learner/clip_share_low"] == line["learner/clip_share_high"] == 0
        assert line["learner/gap_lag0_max"] < 1e-3
        assert line["learner/kept_weight"] < 1
        assert line["learner/zero_advantage_share"] < 1
    assert any("selection/pays_for_length" in line for line in run.metrics())


def test_ctrl_c_stops_cleanly_and_accounts_for_every_token(tmp_path: Path) -> None:
    config = config_file(tmp_path, "scripted.yaml", learner={"steps": 100_000})
    process = launch(config)
    wait_for_step(config, 5)
    process.send_signal(signal.SIGINT)
    run = ended(process, config)
    assert run.code == 130, run.output
    assert run.read("state.json")["status"] == "stopped"
    check_ledger(run, config)
    assert_no_process_is_left(run.run_dir)


def test_a_broken_reward_function_ends_the_run_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def judge(**item):\n    raise RuntimeError('the judge is out')\n")
    config = config_file(tmp_path, "scripted.yaml", reward={"function": "broken:judge"})
    run = ended(launch(config), config)
    assert run.code == 1, run.output
    said = " ".join(run.output.split())
    assert "reward.max_failed_share (0.5); the last failure was raised: RuntimeError: the judge is out" in said
    assert_no_process_is_left(run.run_dir)


FLAKY = """
import itertools, subprocess
calls = itertools.count(1)

def judge(**item):
    number = next(calls)
    if number == 1:
        subprocess.run(["setsid", "-f", "sleep", "611"], check=True)
    if number % 5 == 0:
        raise RuntimeError("the judge is tired")
    return float(number % 2)
"""


def test_a_reward_that_fails_now_and_then_costs_its_samples_alone_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "flaky.py").write_text(FLAKY)
    shaping = {"rule": "none", "keep": 4, "launch": 4}
    config = config_file(tmp_path, "scripted.yaml", shaping=shaping, reward={"function": "flaky:judge"})
    run = ended(launch(config), config)
    assert run.code == 0, run.output
    rewards = run.read("summary.json")["rewards"]
    assert set(rewards["failed"]) == {"raised"}
    assert 0.1 < rewards["failed"]["raised"] / rewards["num_judged"] < 0.3
    assert "has no reward (which is not a reward of 0): raised: RuntimeError: the judge is tired" in run.output
    assert f"{rewards['failed']['raised']:,} of {rewards['num_judged']:,} rewards failed" in run.output
    steps = [line for line in run.metrics() if "groups/kept_mean" in line]
    assert all(2 <= line["groups/kept_mean"] < 4 for line in steps)
    groups = Counter(e.reason for e in read_ledger(run.run_dir / "ledger.msgpack") if isinstance(e, GroupDropped))
    assert groups["too_few_rewards"] < len(steps)
    assert [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "611"]] == []
    assert_no_process_is_left(run.run_dir)
