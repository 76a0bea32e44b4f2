"""A learner of real processes, and the rest of its run played by the test: shaper, one generator, launcher."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from darts_async.config import RunConfig
from darts_async.protocol import (
    CatchUp,
    Greet,
    GroupsCommitted,
    LearnerReady,
    Message,
    ShaperSnapshot,
    Shutdown,
    StepCompleted,
    TrainGroup,
    VersionPublished,
    VersionSaved,
)
from darts_async.topology.links import AGENTS_LINK, link_named
from darts_async.topology.plan import RunPlan, encode_plan
from darts_async.topology.roles import LAUNCHER
from darts_async.transport import (
    Endpoint,
    Event,
    Link,
    Mailbox,
    PeerDown,
    PeerUp,
    Received,
    create_run_keys,
    load_keys,
)
from darts_async.weights.receiving.receive import Receiver
from darts_async.weights.receiving.transfer import LocalTransfer
from launcher.plan.plan import link_hubs, plan_run
from tests.learner.world import make_group

HOST = "127.0.0.1"
PATIENCE_S = 120.0
LENGTHS = ([9, 3, 14, 5, 8], [6], [4, 4, 4], [20, 2])
REWARDS = ([1.0, 0.0, 0.5, 1.0, 0.0], [0.5], [1.0, 1.0, 1.0], [0.0, 1.0])
GROUPS_PER_STEP = len(LENGTHS)
"""Of many samples, of one (so that a rank has nothing to do), without advantages at all, of two."""


def settings(num_ranks: int, **learner: object) -> RunConfig:
    """A run of the model that is shipped."""
    values = {"steps": 4, "groups_per_step": GROUPS_PER_STEP, "learning_rate": 3e-3, "checkpoint_every": 2}
    return RunConfig.model_validate(
        {
            "roles": {"learner": {"replicas": num_ranks}},
            "shaping": {"rule": "none", "launch": 8, "keep": 8},
            "learner": {**values, "tokens_per_micro_batch": 24, "rank_deadline_s": 60.0, **learner},
            "transport": {"heartbeat_s": 0.2, "dead_after_s": 2.0, "linger_s": 1.0},
        }
    )


def groups_of(step: int, poison: float | None = None) -> list[TrainGroup]:
    """The groups of a step, the same whoever asks."""
    groups = [
        make_group(lengths, group_id=GROUPS_PER_STEP * step + place, step=step, rewards=rewards)
        for place, (lengths, rewards) in enumerate(zip(LENGTHS, REWARDS, strict=True))
    ]
    if poison is not None:
        groups[0].weights[:] = poison
        groups[0].rewards[:] = np.eye(len(LENGTHS[0]))[0]  # one outlier: its advantage is twice the weight
    return groups


@dataclass
class LearnerRun:
    """What the test sees of it."""

    config: RunConfig
    run_dir: Path
    poison: float | None = None
    max_step: int = 1 << 30
    """Groups of later steps are not sent."""
    early_step: int | None = None
    """Groups of this step come before the learner has said where it stands."""
    has_spoken: bool = False
    """The present incarnation, to the shaper."""
    is_silent: bool = False
    """The shaper has no word for the learner."""
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    committed: list[tuple[int, list[int]]] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    published: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    first_words: list[type[Message]] = field(default_factory=list)
    """What each incarnation told the shaper first."""
    weights: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)

    async def play(self, tasks: asyncio.TaskGroup) -> None:
        """Bind what the others bind, and answer as they do."""
        self.plan = self._plan()
        self.mailbox = Mailbox()
        self.endpoints = [self._endpoint(name) for name in ("shaper/0", LAUNCHER, "generator/0")]
        self.receiver = Receiver(
            lambda message: self.links["weights"].send("learner/0", message), LocalTransfer(HOST, self._apply)
        )
        await self.receiver.open(tasks)
        tasks.create_task(self._feed(), name="feed")

    async def start(self, incarnation: int = 1) -> None:
        """Start every rank."""
        for name in self.plan.names("learner"):
            spec = self.plan.process(name)
            log = self.run_dir / "logs" / f"{name.replace('/', '-')}.err"
            with log.open("ab") as stderr:
                self.processes[name] = await asyncio.create_subprocess_exec(
                    *spec.argv[:-1], str(incarnation), env={**os.environ, **spec.env}, stderr=stderr
                )

    def send_groups(self, step: int) -> None:
        """What a step is made of."""
        for group in groups_of(step, self.poison):
            self._tell(group)

    async def kill(self, *names: str) -> None:
        """As a crash of the machine would."""
        for name in names:
            self.processes[name].kill()
            await self.processes[name].wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait; the learner must not have ended."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                assert all(process.returncode is None for process in self.processes.values()), self.errors()
                await asyncio.sleep(0.02)

    async def finish(self) -> None:
        """Train to the end, and end well."""
        await self.until(lambda: self.published[-1:] == [self.config.learner.steps])
        for name in self.processes:
            self.links["launcher"].send(name, Shutdown("all steps taken", finished=True))
        assert await self.exit_codes() == dict.fromkeys(self.processes, 0), self.errors()

    async def exit_codes(self) -> dict[str, int]:
        """When all have ended."""
        async with asyncio.timeout(PATIENCE_S):
            return {name: await process.wait() for name, process in self.processes.items()}

    def errors(self) -> str:
        """What the processes have printed."""
        return "\n".join(path.read_text() for path in sorted((self.run_dir / "logs").glob("*.err")))

    async def close(self) -> None:
        for process in self.processes.values():
            if process.returncode is None:
                process.kill()
                await process.wait()
        await self.receiver.close(PATIENCE_S)
        for endpoint in self.endpoints:
            await endpoint.close()

    # --- the others ------------------------------------------------------------------------------------------

    def _plan(self) -> RunPlan:
        addresses = [f"tcp://{HOST}:{port}" for port in free_ports(len(link_hubs(self.config)))]
        plan = plan_run(self.config, self.run_dir, addresses)
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (self.run_dir / "config.yaml").write_text(yaml.safe_dump(self.config.model_dump(mode="json")))
        (self.run_dir / "plan.json").write_bytes(encode_plan(plan))
        if not (self.run_dir / "keys").exists():
            create_run_keys(self.run_dir / "keys", plan.endpoints())
        return plan

    def _endpoint(self, name: str) -> Endpoint:
        keys = load_keys(self.run_dir / "keys", name)
        endpoint = Endpoint(name, 1, keys, self.config.transport, self.mailbox)
        for link in self.plan.links:
            if link.name == AGENTS_LINK.name:
                continue  # the launcher's own
            sends, receives = link_named(link.name).hub_sends, link_named(link.name).member_sends
            if link.hub == name and link.name in ("learner", "launcher"):
                allowed = {member: keys.public_of(member) for member in link.members}
                self.links[link.name] = endpoint.bind_link(
                    name=link.name, address=link.address, receives=receives, sends=sends, allowed=allowed
                )
            elif name in link.members and link.name == "weights":
                self.links[link.name] = endpoint.connect_link(
                    name=link.name,
                    address=link.address,
                    peer=link.hub,
                    peer_key=keys.public_of(link.hub),
                    receives=sends,
                    sends=receives,
                )
        return endpoint

    async def _feed(self) -> None:
        while True:
            for event in await self.mailbox.receive(1.0):
                self._handle(event)

    def _handle(self, event: Event) -> None:
        match event:
            case PeerUp(link="learner"):
                self.has_spoken = False
                if self.early_step is not None:
                    self.send_groups(self.early_step)
                self._tell(Greet(1))
            case PeerDown(link="weights"):
                self.receiver.learner_lost()
            case Received(link="weights", message=Greet()):
                self.receiver.join()
            case Received(link="weights", message=message):
                self.receiver.handle(message)  # type: ignore[arg-type]
            case Received(message=StepCompleted(step, metrics)):
                self.metrics.setdefault(step, {}).update(metrics)
            case Received(link="learner", message=message):
                self._shape(message)

    def _shape(self, message: Message) -> None:
        if not self.has_spoken:
            self.has_spoken = True
            self.first_words.append(type(message))
        match message:
            case LearnerReady(version):
                self.ready.append(version)
                if self.is_silent:
                    return
                floor = max(version, len({step for step, _ in self.committed}))
                self._tell(CatchUp(floor, self.config.learner.steps))
                for step in range(min(self.config.learner.steps, self.max_step + 1)):  # all, also those it has had
                    self.send_groups(step)
            case GroupsCommitted(step=step, group_ids=group_ids):
                self.committed.append((step, group_ids.tolist()))
                self._tell(ShaperSnapshot(step + 1, f"the shaper after step {step}".encode()))
            case VersionPublished(version):
                self.published.append(version)
            case VersionSaved(version):
                self.saved.append(version)

    def _tell(self, message: Any) -> None:
        self.links["learner"].send("learner/0", message)

    async def _apply(self, tensors: dict[str, torch.Tensor], policy_version: int) -> float:
        self.weights[policy_version] = {name: tensor.clone() for name, tensor in tensors.items()}
        return 0.0


@asynccontextmanager
async def learner_run(run_dir: Path, config: RunConfig, **options: Any) -> AsyncIterator[LearnerRun]:
    """A run that leaves no process behind; the learner is not started."""
    run = LearnerRun(config, run_dir, **options)
    async with asyncio.TaskGroup() as tasks:
        await run.play(tasks)
        played = [task for task in asyncio.all_tasks() if task.get_name() in ("feed", "weights")]
        try:
            yield run
        finally:
            for task in played:
                task.cancel()
            await run.close()


def free_ports(number: int) -> list[int]:
    """Ports that nobody uses just now."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
