"""A shaper dies at any record of its journal, or in the middle of one, and goes on as if nothing had been."""

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts_async.config import RunConfig
from darts_async.errors import DataError, NoSpaceError
from darts_async.prompts.source import ShuffledPrompts
from darts_async.protocol import EvaluationCompleted, GroupsCommitted, RunFinished, ShaperSnapshot, StepCompleted
from darts_async.shaper.durable.journal import MIN_BYTES, Journal, read_journal
from darts_async.shaper.durable.recovery import take_up
from darts_async.shaper.durable.replayable_state import (
    AnyInput,
    CameUp,
    Confirmed,
    Heard,
    ReplayableState,
    Restarted,
    Stopped,
    Ticked,
    WentDown,
)
from darts_async.shaper.ledger import GroupOpened, LedgerWriter, VersionSeen, read_ledger
from darts_async.shaper.outbox import Forget, Output, SendTo
from darts_async.shaper.phases import RunPhase
from darts_async.shaper.state import Incoming, ShaperState, StateSnapshot
from darts_async.topology.roles import LAUNCHER, LEARNER
from darts_async.wire.framing import HEAD_BYTES, frame
from launcher.analysis.audit_books import Books, audit
from tests.shaper.test_state import RULES
from tests.shaper.world import World, prompts, world_config
from tests.support.small_disk import BALLAST, small_disk, why_not

DEATHS = ("decided", "torn", "journaled", "half in the ledger", "in the ledger", "half sent")
"""Where the process is when it dies."""


class Died(Exception):
    """`outputs` had left by then."""

    def __init__(self, *, journaled: bool, outputs: list[Output]) -> None:
        super().__init__()
        self.journaled = journaled
        self.outputs = outputs


class Process:
    """Stands where the shaper's state stands in a `World`, with real files."""

    def __init__(self, config: RunConfig, directory: Path, rng: random.Random) -> None:
        self._config, self._path, self._rng = config, directory / "shaper.journal", rng
        self.ledger_path = directory / "ledger.msgpack"
        self.death: str | None = None
        self._journal, self._ledger = Journal(self._path), LedgerWriter(self.ledger_path)
        self.replayable = ReplayableState(self._make_state)
        self._journal.begin(self.replayable.to_head(0))

    def _make_state(self, snapshot: StateSnapshot | None) -> ShaperState:
        return ShaperState(self._config, ShuffledPrompts(prompts(20), seed=1), prompts(2), snapshot=snapshot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replayable.state, name)

    def handle(self, peer: str, message: Incoming, now_s: float) -> list[Output]:
        return self.take(Heard(now_s, peer, 1, self.next_number(peer), message))

    def peer_up(self, peer: str, incarnation: int, now_s: float) -> list[Output]:
        return self.take(CameUp(now_s, peer, incarnation))

    def peer_lost(self, peer: str, now_s: float, *, is_gone: bool) -> list[Output]:
        return self.take(WentDown(now_s, peer, is_gone))

    def tick(self, now_s: float) -> list[Output]:
        return self.take(Ticked(now_s))

    def stop(self, reason: str, now_s: float) -> list[Output]:
        return self.take(Stopped(now_s, reason))

    def take(self, given: AnyInput) -> list[Output]:
        outputs = self.replayable.take(given)
        records = [output for output in outputs if not isinstance(output, SendTo | Forget)]
        death, self.death = self.death, None
        if death == "decided":
            raise Died(journaled=False, outputs=[])
        self._journal.append([given])
        if death == "torn":
            size = self._path.stat().st_size
            last = size - read_journal_bytes_before_last(self._path)
            os.truncate(self._path, size - self._rng.randint(1, last))
            raise Died(journaled=False, outputs=[])
        if death == "journaled":
            raise Died(journaled=True, outputs=[])
        before = self._ledger.num_bytes
        self._ledger.append(records)
        if death == "half in the ledger":
            os.truncate(self.ledger_path, self._rng.randint(before, self._ledger.num_bytes))
            raise Died(journaled=True, outputs=[])
        if death is not None:
            raise Died(journaled=True, outputs=outputs[: len(outputs) // 2] if death == "half sent" else [])
        if self._rng.random() < 0.02:
            if not self._journal.is_prepared:
                self._journal.prepare(self.replayable.to_head(self._ledger.num_bytes))
            elif self._rng.random() < 0.5:
                self._journal.replace()
            else:  # it died here: the old one is still in its place
                self.revive()
        return outputs

    def close(self) -> None:
        """The files, as the kernel does when a process dies."""
        self._journal.close()
        self._ledger.close()

    def revive(self) -> None:
        """Another process takes the place of this one."""
        self.close()
        self._journal, self._ledger = Journal(self._path), LedgerWriter(self.ledger_path)
        found = read_journal(self._path)
        self.replayable = take_up(found, self._ledger, self._make_state)
        self._journal.resume(found.num_bytes)

    def next_number(self, peer: str) -> int:
        """The first message of the peer that is not in the journal."""
        return self.replayable.heard.get(peer, (1, 0))[1]


def make_state(snapshot: StateSnapshot | None) -> ShaperState:
    return ShaperState(world_config(), ShuffledPrompts(prompts(3), seed=1), (), snapshot=snapshot)


def read_journal_bytes_before_last(path: Path) -> int:
    """Where the last whole record begins."""
    data, begin, last = path.read_bytes(), 0, 0
    while begin < len(data):
        last, begin = begin, begin + HEAD_BYTES + int.from_bytes(data[begin : begin + 4], "little")
    return last


class MortalWorld(World):
    """A world whose shaper may die at any message. `deaths`: where, at how manieth message; 0 means at each commit."""

    def __init__(self, config: RunConfig, directory: Path, deaths: dict[int, str], rng: random.Random) -> None:
        self._directory, self._deaths, self._rng = directory, deaths, rng
        self._num_fed = self._depth = self.num_deaths = 0
        super().__init__(config)

    def make_state(self) -> Any:
        return Process(self.config, self._directory, self._rng)

    def feed(self, peer: str, message: Incoming) -> None:
        self.now_s += 0.01
        if self._depth == 0:
            self._num_fed += 1
            self.state.death = self._deaths.get(0 if isinstance(message, GroupsCommitted) else self._num_fed)
        number = self.state.next_number(peer)
        try:
            outputs = self.state.handle(peer, message, self.now_s)
        except Died as death:
            end = death
        else:
            self.absorb(outputs)
            return
        super().absorb(end.outputs)
        self.state.revive()
        assert self.state.next_number(peer) == number + end.journaled
        self._come_back({} if end.journaled else {peer: message})

    def absorb(self, outputs: list[Output]) -> None:
        self._depth += 1
        super().absorb(outputs)
        self._depth -= 1
        if self._depth == 0 and self._rng.random() < 0.2:
            for peer in (LAUNCHER, LEARNER.first):
                super().absorb(self.state.take(Confirmed(self.now_s, peer)))

    def _come_back(self, unacknowledged: dict[str, Incoming]) -> None:
        """Another process is up. What the one before has not acknowledged comes again, before anything else."""
        self.num_deaths += 1
        self.state.validate()
        for generator in self.generators.values():  # what it was sent and has not taken is gone with the process
            generator.inbox.clear()
        self.absorb(list(self.state.replayable.reports))
        self.absorb(self.state.take(Restarted(self.now_s)))
        for peer in (*self.generators, "reward/0", LEARNER.first):
            outputs = self.state.peer_up(peer, 1, self.now_s)
            if peer in unacknowledged:
                outputs += self.state.handle(peer, unacknowledged[peer], self.now_s)
            self.absorb(outputs)


def check(world: MortalWorld) -> None:
    world.state.close()
    config, finished = world.config, world.finished
    books = Books.of(read_ledger(world.state.ledger_path))
    assert audit(books, config, is_over=True, num_steps=config.learner.steps) == []
    assert sum(finished.tokens_by_outcome.values()) == world.num_decoded
    assert sum(map(sum, (counts.values() for counts in finished.tokens_by_generator.values()))) == world.num_decoded
    assert world.max_staleness_seen <= config.staleness.max_staleness
    steps = {m.step for m in world.to_launcher if isinstance(m, StepCompleted)}
    assert steps == set(range(config.learner.steps)), "every step was reported"
    assert {m.policy_version for m in world.to_launcher if isinstance(m, EvaluationCompleted)} == {0, max(steps) + 1}
    assert len({repr(m) for m in world.to_launcher if isinstance(m, RunFinished)}) == 1


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rule=st.sampled_from(sorted(RULES)),
    deaths=st.dictionaries(st.integers(0, 400), st.sampled_from(DEATHS), min_size=1, max_size=8),
)
def test_nothing_is_lost_and_nothing_comes_twice_wherever_the_process_dies(
    seed: int, rule: str, deaths: dict[int, str]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        rng = random.Random(seed)
        world = MortalWorld(world_config(shaping=RULES[rule]), Path(directory), deaths, rng)
        world.run(rng)
        check(world)


@pytest.mark.parametrize("death", DEATHS)
def test_a_run_survives_a_death_at_every_commit_and_every_fortieth_message(death: str, tmp_path: Path) -> None:
    rng = random.Random(7)
    world = MortalWorld(world_config(), tmp_path, dict.fromkeys([0, *range(3, 20_000, 40)], death), rng)
    world.run(rng)
    check(world)
    assert world.num_deaths > 5
    assert sorted(path.name for path in tmp_path.iterdir()) in (
        ["ledger.msgpack", "shaper.journal"],
        ["ledger.msgpack", "shaper.journal", "shaper.new"],
    )


def test_a_torn_record_is_not_read_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    path, journal = tmp_path / "shaper.journal", Journal(tmp_path / "shaper.journal")
    journal.begin(ReplayableState(make_state).to_head(0))
    journal.append([Ticked(1.0), WentDown(2.0, "reward/0", is_gone=True)])
    journal.close()
    os.truncate(path, path.stat().st_size - 3)
    found = read_journal(path)
    assert found.head is not None
    assert (found.head.now_s, found.inputs, found.fault) == (0.0, [Ticked(1.0)], "")
    journal.resume(found.num_bytes)
    journal.append([Ticked(3.0)])
    journal.close()
    assert read_journal(path).inputs == [Ticked(1.0), Ticked(3.0)]


def test_the_journal_begins_anew_when_its_inputs_outweigh_its_head(tmp_path: Path) -> None:
    path = tmp_path / "shaper.journal"
    journal, replayable = Journal(path), ReplayableState(make_state)
    journal.begin(replayable.to_head(0))
    num_records = 0
    while not journal.is_due:
        journal.append([WentDown(1.0, "x" * 1000, is_gone=True)])
        num_records += 1
        assert num_records <= MIN_BYTES // 1000 + 1
    journal.prepare(replayable.to_head(0))
    assert not journal.is_due, "one is on its way"
    journal.append([Ticked(1.0)])
    assert len(read_journal(path).inputs) == num_records + 1, "until the new one is flushed, the old one is whole"
    journal.replace()
    assert not journal.is_due
    journal.append([Ticked(2.0)])
    journal.close()
    assert read_journal(path).inputs == [Ticked(1.0), Ticked(2.0)]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (None, "is not there"),
        (b"", "has no whole record in its 0 bytes"),
        (bytes(64), "is damaged from byte 0 of 64 on"),
        (frame(b"ab"), "not a journal of this version"),
        (frame(b"ab")[:-1], "has no whole record"),
    ],
)
def test_what_is_no_journal_is_not_guessed_at_while_the_run_is_live(
    tmp_path: Path, data: bytes | None, complaint: str
) -> None:
    path, ledger = tmp_path / "shaper.journal", LedgerWriter(tmp_path / "ledger")
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{complaint}.*darts-launch resume {tmp_path}"):
        take_up(read_journal(path), ledger, make_state)
    ledger.close()


def test_a_ledger_is_completed_from_anywhere_in_what_is_missing_and_never_overwritten(tmp_path: Path) -> None:
    records = [VersionSeen(1), GroupOpened(0, 3, "train", 4, 1, 1), VersionSeen(2)]
    whole = LedgerWriter(tmp_path / "whole")
    whole.append(records[:1])
    begin = whole.num_bytes
    whole.append(records[1:])
    whole.close()
    data = (tmp_path / "whole").read_bytes()
    for size in range(begin, len(data) + 1):
        path = tmp_path / str(size)
        path.write_bytes(data[:size])
        ledger = LedgerWriter(path)
        ledger.catch_up(begin, records[1:])
        ledger.close()
        assert path.read_bytes() == data
    for size, others in ((begin - 1, records[1:]), (len(data), [VersionSeen(3)])):
        path = tmp_path / "other"
        path.write_bytes(data[:size])
        ledger = LedgerWriter(path)
        with pytest.raises(DataError, match=rf"does not continue from byte .* darts-launch resume {tmp_path}"):
            ledger.catch_up(begin, others)
        ledger.close()
        assert path.read_bytes() == data[:size]


def test_the_share_of_a_checkpoint_is_sent_again_until_the_learner_has_it() -> None:
    config = world_config(learner={"steps": 4, "checkpoint_every": 2})
    with tempfile.TemporaryDirectory() as directory:
        rng = random.Random(3)
        world = MortalWorld(config, Path(directory), {}, rng)
        while world.state.num_steps < 2:
            move, *arguments = rng.choice(world.moves())
            move(*arguments)
        replayable = world.state.replayable
        replayable.take(Confirmed(world.now_s, LAUNCHER))
        assert all(isinstance(report.message, ShaperSnapshot) for report in replayable.reports)
        replayable.take(Confirmed(world.now_s, LEARNER.first))
        assert replayable.reports == []
        world.state.close()
        assert world.state.phase is RunPhase.TRAINING


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_new_journal_that_the_disk_does_not_take_takes_no_room(tmp_path: Path) -> None:
    replayable = ReplayableState(lambda snapshot: World(world_config()).make_state())
    with small_disk(tmp_path / "disk", num_mb=1) as disk:
        path = disk.path / "shaper.journal"
        journal = Journal(path)
        journal.begin(replayable.to_head(0))
        disk.fill()
        with pytest.raises(NoSpaceError, match=r"shaper\.new cannot be written"):
            journal.prepare(replayable.to_head(0))
        journal.close()
        assert sorted(each.name for each in disk.path.iterdir()) == [BALLAST, path.name]
        assert read_journal(path).head is not None


def test_a_new_journal_of_a_process_that_has_died_takes_no_room(tmp_path: Path) -> None:
    replayable = ReplayableState(lambda snapshot: World(world_config()).make_state())
    path = tmp_path / "shaper.journal"
    journal = Journal(path)
    journal.begin(replayable.to_head(0))
    journal.prepare(replayable.to_head(0))
    journal.close()
    successor = Journal(path)
    successor.resume(read_journal(path).num_bytes)
    successor.close()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
