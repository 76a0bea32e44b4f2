"""A process of a run that does nothing but talk to the launcher, well or badly.

python -m tests.fakes.process --run-dir DIR --name generator/0 --incarnation 1 --behaviour good --steps 3
"""

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

import numpy as np

from darts_async.config import TransportConfig
from darts_async.machine.lifetime import die_with_parent
from darts_async.protocol import (
    EvaluationCompleted,
    LauncherToProcess,
    ProcessStatus,
    ProcessToLauncher,
    RunFinished,
    Shutdown,
    StepCompleted,
)
from darts_async.topology.plan import read_plan
from darts_async.topology.roles import LAUNCHER
from darts_async.transport import Endpoint, Link, Mailbox, Received, load_keys

TOKENS_PER_STEP = 1000


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--incarnation", type=int)
    parser.add_argument("--behaviour", default="good")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--step-s", type=float, default=0.0)
    arguments = parser.parse_args()
    if arguments.behaviour == "dies":
        sys.stderr.write("the sky is falling\n")
        sys.exit(3)
    if arguments.behaviour in ("deaf", "mute"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asyncio.run(live(arguments))


async def live(arguments: argparse.Namespace) -> None:
    mailbox = Mailbox()
    name = arguments.name
    if arguments.behaviour == "mute":
        await asyncio.sleep(3600)
    keys = load_keys(arguments.run_dir / "keys", name)
    endpoint = Endpoint(name, arguments.incarnation, keys, TransportConfig(), mailbox)
    address = read_plan(arguments.run_dir).link("launcher").address
    link = endpoint.connect_link(
        name="launcher",
        address=address,
        peer=LAUNCHER,
        peer_key=keys.public_of(LAUNCHER),
        receives=LauncherToProcess,
        sends=ProcessToLauncher,
    )
    await talk(arguments, link, mailbox)
    if arguments.behaviour == "deaf":
        await asyncio.sleep(3600)
    mailbox.acknowledge()
    await endpoint.close()


async def talk(arguments: argparse.Namespace, link: Link, mailbox: Mailbox) -> None:
    started_s = time.monotonic()
    role = arguments.name.partition("/")[0]
    steps = arguments.steps
    step = -1 if role == "shaper" else 0
    while True:
        tell = status(role, min(step, steps), time.monotonic() - started_s)
        link.send(LAUNCHER, tell)
        if role == "shaper" and step <= steps and arguments.behaviour != "idle":
            for message in shaper_messages(step, steps):
                link.send(LAUNCHER, message)
        elif role == "learner" and step < steps and arguments.behaviour != "idle":
            for message in learner_messages(step):
                link.send(LAUNCHER, message)
        step = min(step + 1, steps + 1)
        for event in await mailbox.receive(arguments.step_s or 0.05):
            if isinstance(event, Received) and isinstance(event.message, Shutdown):
                if role == "shaper" and step <= steps:
                    link.send(LAUNCHER, RunFinished(event.message.reason, {}, {}, {}, 0))
                for missing in range(step, steps) if role == "learner" and event.message.finished else ():
                    for message in learner_messages(missing):
                        link.send(LAUNCHER, message)
                link.send(LAUNCHER, status(role, steps, time.monotonic() - started_s))
                return
        await asyncio.sleep(arguments.step_s)


def status(role: str, step: int, uptime_s: float) -> ProcessStatus:
    num_tokens = TOKENS_PER_STEP * max(0, step) if role == "generator" else 0
    busy_s = {"decode": uptime_s * 0.8, "swap": uptime_s * 0.1, "idle": uptime_s * 0.1}
    return ProcessStatus("working", max(0, step), num_tokens, 7, uptime_s, busy_s, 0.001)


def learner_messages(step: int) -> list[StepCompleted]:
    return [StepCompleted(step, {"loss": 0.5 / (step + 1)}), StepCompleted(step, {"weights/publish_s": 0.01})]


def shaper_messages(step: int, steps: int) -> list[ProcessToLauncher]:
    """What the shaper says at each step: an evaluation before the first, another and the totals after the last."""
    if 0 <= step < steps:
        return [StepCompleted(step, {"reward/pool_mean": 0.1 * step, "length/pool_mean": 100.0 - step})]
    rewards = np.array([0, 1, 0, 0] if step < 0 else [1, 1, 0, 1], np.float32)
    lengths = np.array([10, 20, 30, 40], np.int32) // (1 if step < 0 else 2)
    version = max(0, step)
    evaluation = EvaluationCompleted(version, np.array([0, 0, 1, 1]), rewards, lengths, newest_version=version)
    if step < 0:
        return [evaluation]
    total = TOKENS_PER_STEP * steps
    outcomes = {"trained": total - 300, "cancelled": 150, "filtered": 50, "evaluated": 100}
    return [evaluation, RunFinished("all steps taken", outcomes, {"trained": 10}, {0: 100, 1: total - 400}, steps)]


if __name__ == "__main__":
    main()
