"""The power goes: journal, ledger and checkpoints each lose what they lose, and the next life of the run goes on."""

import random
import shutil
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darts_async.config import RunConfig
from darts_async.protocol import CatchUp, Greet, LearnerReady, ShaperSnapshot, TrainGroup, VersionSaved
from darts_async.shaper.durable.journal import FoundJournal, Journal, read_journal
from darts_async.shaper.durable.recovery import NewestCheckpoint, TakenUp, newest_checkpoint, take_up_again
from darts_async.shaper.durable.replayable_state import ReplayableState
from darts_async.shaper.ledger import BroughtForward, LedgerWriter, TakenBack, scan_ledger
from darts_async.shaper.phases import RunPhase
from darts_async.topology.roles import LEARNER
from darts_async.topology.run_files import CHECKPOINTS_DIR, JOURNAL_FILE, LEDGER_FILE, SHAPER_STATE_FILE
from darts_async.wire.framing import HEAD_BYTES, read_frames
from launcher.analysis.audit_books import Books, audit
from tests.shaper.durable.test_journal import MortalWorld, Process
from tests.shaper.test_state import RULES
from tests.shaper.world import FakeGenerator, world_config

SETTINGS: dict[str, dict[str, Any]] = {
    "learner": {"steps": 6, "groups_per_step": 2, "checkpoint_every": 2},
    "shaping": {"rule": "none", "keep": 2, "launch": 2},
    "generator": {"num_slots": 4, "max_queued": 1},
    "evaluation": {"samples_per_prompt": 1},
}


class PoweredWorld(MortalWorld):
    """A world of several lives. Its learner leaves checkpoints on the disk, with what the shaper gave for them."""

    def __init__(self, config: RunConfig, directory: Path) -> None:
        self.directory, self.life = directory, 1
        self.shared: dict[int, bytes] = {}
        self.histories: dict[int, list[list[int]]] = {}
        super().__init__(config, directory, {}, random.Random(1))

    def learn(self, *, tells: bool = True) -> None:
        super().learn(tells=tells)
        if tells and self.config.learner.is_saved(self.version) and self.version < self.config.learner.steps:
            self.save()

    def save(self, *, tells: bool = True) -> None:
        path = self.checkpoint(self.version)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.shared.get(self.version, b""))
        self.histories[self.version] = [*self.history]
        super().save(tells=tells)

    def checkpoint(self, version: int) -> Path:
        return self.directory / CHECKPOINTS_DIR / f"step-{version:06d}" / SHAPER_STATE_FILE

    def _tell_learner(self, message: Greet | CatchUp | TrainGroup | ShaperSnapshot) -> None:
        match message:
            case ShaperSnapshot(policy_version=version, state=state):
                self.shared[version] = state
            case Greet() if self.saved:
                state = self.checkpoint(self.saved).read_bytes()
                consumed = [group_id for groups in self.history[: self.saved] for group_id in groups]
                self.feed(LEARNER.first, LearnerReady(self.version, state, max(consumed) + 1))
                self.feed(LEARNER.first, VersionSaved(self.saved, self.oldest_kept))
            case _:
                super()._tell_learner(message)

    def power_up(self, *, from_checkpoint: bool = False) -> TakenUp:
        """The next life, from what the directory has. The learner takes the newest checkpoint that is there."""
        self.life += 1
        process = self.state
        process.close()
        process.replayable, found = take_up_files(process, self.life, from_checkpoint=from_checkpoint)
        self.state.validate()
        there = sorted(version for version in self.histories if self.checkpoint(version).exists())
        self.kept, self.damaged = there[-self.config.learner.keep_checkpoints :], []
        self.version = self.floor = self.saved
        self.learner += 1
        self.history = [*self.histories.get(self.saved, [])]
        self.seen_groups = {group_id for groups in self.history for group_id in groups}
        self.step_groups, self.to_score, self.to_launcher = [], deque(), []
        self.generators = {name: FakeGenerator(incarnation=10 * self.life) for name in self.generators}
        self.absorb(found.outputs)
        for peer in (*self.generators, "reward/0", LEARNER.first):
            self.absorb(self.state.peer_up(peer, 10 * self.life, self.now_s))
        self.num_decoded = process.work.totals.num_tokens_received
        return found

    def check_end(self) -> None:
        self.state.close()
        ledger = scan_ledger(self.state.ledger_path)
        books = Books.of(ledger.records)
        assert audit(books, self.config, is_over=True, num_steps=self.config.learner.steps) == []
        assert sum(self.finished.tokens_by_outcome.values()) == self.num_decoded
        in_ledger = sum(books.brought.tokens_by_outcome.values()) + sum(each.num_tokens for each in books.ended())
        assert in_ledger == self.num_decoded - self.finished.tokens_by_outcome.get("abandoned", 0) + abandoned_in(books)
        assert self.version == self.config.learner.steps
        assert [sorted(groups) for groups in self.history[books.brought.num_steps :]] == [
            sorted(groups) for groups in books.history[books.brought.num_steps :]
        ], "the model is made of what the ledger says"


def abandoned_in(books: Books) -> int:
    """Tokens of samples that were abandoned. Others came of generators that had lost the sample."""
    ended = sum(each.num_tokens for each in books.ended() if each.outcome == "abandoned")
    return ended + books.brought.tokens_by_outcome.get("abandoned", 0)


def take_up_files(process: Process, life: int, *, from_checkpoint: bool = False) -> tuple[ReplayableState, TakenUp]:
    """What the shaper's process does in another life of the run."""
    directory = process.ledger_path.parent
    journal, ledger = read_journal(directory / JOURNAL_FILE), scan_ledger(process.ledger_path)
    if from_checkpoint:
        journal = FoundJournal(None, [], 0, "not to be used")
    found = take_up_again(journal, ledger, newest_checkpoint(directory), process._make_state, life=life, now_s=1.0)
    process._ledger, process._journal = LedgerWriter(process.ledger_path), Journal(directory / JOURNAL_FILE)
    process._ledger.cut(ledger.num_bytes)
    process._ledger.append(found.records)
    process._journal.begin(found.replayable.to_head(process._ledger.num_bytes))
    return found.replayable, found


def play(world: PoweredWorld, rng: random.Random, num_moves: int) -> None:
    for _ in range(num_moves):
        if world.state.phase is RunPhase.FINISHED or not world.moves():
            return
        move, *arguments = rng.choice(world.moves())
        move(*arguments)


def boundaries(path: Path) -> list[int]:
    """Where the records of a file end."""
    ends = [0]
    for payload in read_frames(path.read_bytes()).payloads:
        ends.append(ends[-1] + HEAD_BYTES + len(payload))
    return ends


def checked_take_up(directory: Path, config: RunConfig, life: int) -> TakenUp:
    """Take up the files of a directory. What is in the ledger then is what the state says, and is in order."""
    world = object.__new__(Process)
    world._config, world.ledger_path = config, directory / LEDGER_FILE
    replayable, found = take_up_files(world, life)
    world._ledger.close()
    world._journal.close()
    replayable.state.validate()
    ledger = scan_ledger(directory / LEDGER_FILE)
    assert (ledger.counted.lineage.num_records, ledger.counted.lineage.firsts) == (
        replayable.lineage.num_records,
        replayable.lineage.firsts,
    )
    books, totals = Books.of(ledger.records), replayable.state.work.totals
    assert audit(books, config, is_over=False, num_steps=None) == []
    assert len(books.history) == replayable.state.feed.committed.position
    num_ended = sum(books.brought.samples_by_outcome.values()) + sum(1 for _ in books.ended())
    assert num_ended == sum(totals.samples_by_outcome.values())
    open_samples = {s.sample_id for s in replayable.state.work.samples() if s.stage.name != "ENDED"}
    assert books.drawn - books.endings.keys() == open_samples
    again = read_journal(directory / JOURNAL_FILE)
    assert again.head is not None
    assert again.head.place == replayable.place
    assert ledger.counted.lineage.holds(replayable.place)
    return found


def killed_run(directory: Path, *, new_journal: bool) -> PoweredWorld:
    """A small run that was killed in its fourth step, where the journal may have been begun again on the way."""
    directory.mkdir()
    world = PoweredWorld(world_config(**SETTINGS), directory)
    rng = random.Random(5)
    while world.state.num_steps < 3:
        play(world, rng, 1)
    if new_journal:
        world.state._journal.begin(world.state.replayable.to_head(world.state._ledger.num_bytes))
    play(world, rng, 12)
    world.state.close()
    return world


@pytest.mark.slow
@pytest.mark.parametrize("new_journal", [False, True])
def test_wherever_journal_and_ledger_end_each_alone_and_together_they_are_taken_up(
    tmp_path: Path, new_journal: bool
) -> None:
    world = killed_run(tmp_path / "run", new_journal=new_journal)
    journal, ledger = (tmp_path / "run" / name for name in (JOURNAL_FILE, LEDGER_FILE))
    journal_ends, ledger_ends = boundaries(journal), boundaries(ledger)
    assert len(journal_ends) > (5 if new_journal else 100)
    cuts = [(size, ledger_ends[-1]) for size in journal_ends]
    cuts += [(journal_ends[-1], size) for size in ledger_ends]
    rng = random.Random(3)
    cuts += [(rng.choice(journal_ends), rng.choice(ledger_ends)) for _ in range(60)]
    cuts += [(rng.randint(0, journal_ends[-1]), rng.randint(0, ledger_ends[-1])) for _ in range(60)]
    sources = set()
    for number, (journal_size, ledger_size) in enumerate(cuts):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "run", copy)
        for path, size in ((copy / JOURNAL_FILE, journal_size), (copy / LEDGER_FILE, ledger_size)):
            path.write_bytes(path.read_bytes()[:size])
        sources.add(checked_take_up(copy, world.config, 2).source)
        shutil.rmtree(copy)
    expected = {"journal", "the checkpoint of version 2"}
    assert sources == expected | ({"journal, without the ledger"} if new_journal else set())


@pytest.mark.slow
@pytest.mark.parametrize("name", [JOURNAL_FILE, LEDGER_FILE])
def test_wherever_a_bit_of_journal_or_ledger_is_flipped_they_are_taken_up(tmp_path: Path, name: str) -> None:
    world = killed_run(tmp_path / "run", new_journal=True)
    data = (tmp_path / "run" / name).read_bytes()
    for place in random.Random(1).sample(range(len(data)), 60):
        copy = tmp_path / str(place)
        shutil.copytree(tmp_path / "run", copy)
        (copy / name).write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        checked_take_up(copy, world.config, 2)
        shutil.rmtree(copy)


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_a_run_that_was_stopped_goes_on_from_the_checkpoint_that_the_stop_has_left(
    tmp_path: Path, from_checkpoint: bool
) -> None:
    world, rng = PoweredWorld(world_config(**SETTINGS), tmp_path), random.Random(2)
    while world.state.num_steps != 3:
        play(world, rng, 1)
    world.absorb(world.state.stop("enough", world.now_s))
    while world.state.phase is not RunPhase.FINISHED:
        play(world, rng, 1)
    assert world.version == world.state.num_steps >= 3
    world.save(tells=False)
    assert world.shared[world.version]
    stopped_at = world.version
    found = world.power_up(from_checkpoint=from_checkpoint)
    assert found.source == (f"the checkpoint of version {stopped_at}" if from_checkpoint else "journal")
    assert world.state.num_steps == stopped_at, "no step is taken again"
    world.run(rng)
    world.check_end()


@pytest.mark.parametrize("version", [2, 0])
def test_a_learner_older_than_all_groups_gets_new_ones_of_the_prompts_drawn_since(tmp_path: Path, version: int) -> None:
    """The checkpoints that the groups were kept for are gone, and journal and ledger are whole."""
    config = world_config(**SETTINGS | {"learner": SETTINGS["learner"] | {"keep_checkpoints": 1}})
    world, rng = PoweredWorld(config, tmp_path), random.Random(7)
    while world.version < 5:
        play(world, rng, 1)
    lost = [group_id for groups in world.history[version:] for group_id in groups]
    trained = {world.prompt_of[group_id] for groups in world.history[:version] for group_id in groups}
    for gone in (4,) if version else (2, 4):
        world.checkpoint(gone).unlink()
    num_opened = len(world.opened)
    world.power_up()
    assert (world.version, world.state.num_steps) == (version, version)
    world.run(rng)
    again = [world.prompt_of[group.group_id] for group in world.opened[num_opened:] if group.purpose == "train"]
    assert {world.prompt_of[group_id] for group_id in lost} <= {*again}
    assert not trained & {*again[: len(again) // 2]}, "what the checkpoint has seen waits for its next turn"
    world.check_end()


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 0])
def test_a_run_that_starts_over_is_taken_up_from_the_journal_of_before_wherever_that_and_the_ledger_end(
    tmp_path: Path, version: int
) -> None:
    """The power goes before the next head: what this one has seen of the ledger is void, or will be."""
    config = world_config(**SETTINGS | {"learner": SETTINGS["learner"] | {"keep_checkpoints": 1}})
    (tmp_path / "run").mkdir()
    world, rng = PoweredWorld(config, tmp_path / "run"), random.Random(7)
    while world.version < 5:
        play(world, rng, 1)
    process, journal, ledger = world.state, tmp_path / "run" / JOURNAL_FILE, tmp_path / "run" / LEDGER_FILE
    process.close()
    process.replayable, _ = take_up_files(process, 2)
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS_DIR)
    num_records = len(boundaries(ledger)) - 1
    process.peer_up(LEARNER.first, 11, 50.0)
    process.handle(LEARNER.first, LearnerReady(version), 51.0)
    for generator in world.generators:
        process.peer_up(generator, 11, 52.0)
    process.close()
    assert process.num_steps == version
    written = scan_ledger(ledger).written[num_records:]
    assert any(isinstance(record, BroughtForward if version else TakenBack) for record in written)
    for journal_size in boundaries(journal)[1:]:
        for ledger_size in boundaries(ledger)[num_records:]:
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "run", copy)
            for path, size in ((copy / JOURNAL_FILE, journal_size), (copy / LEDGER_FILE, ledger_size)):
                path.write_bytes(path.read_bytes()[:size])
            assert checked_take_up(copy, config, 3).source == "journal"
            shutil.rmtree(copy)


def test_sums_end_where_a_learner_is_that_takes_steps_again(tmp_path: Path) -> None:
    world = killed_run(tmp_path / "run", new_journal=False)
    process, ledger = world.state, tmp_path / "run" / LEDGER_FILE
    replayable, _ = take_up_files(process, 2)
    process.replayable = replayable
    num_steps = process.num_steps
    process.peer_up(LEARNER.first, 11, 50.0)
    process.handle(LEARNER.first, LearnerReady(2), 51.0)
    assert process.feed.committed.position == 2 < num_steps
    process._journal.begin(process.replayable.to_head(process._ledger.num_bytes))
    process.close()
    ledger.write_bytes(ledger.read_bytes()[: boundaries(ledger)[-2]])
    assert checked_take_up(tmp_path / "run", world.config, 3).source == "journal, without the ledger"
    books = Books.of(scan_ledger(ledger).records)
    assert (books.brought.num_steps, len(books.history)) == (num_steps, 2)


CHECKPOINTS = ["whole", "whole", "whole", "gone", "weights damaged", "without the shaper", "all gone"]
LOSSES = st.fixed_dictionaries(
    {
        "num_moves": st.integers(1, 400),
        "journal": st.sampled_from(["whole", "gone", "empty", "tail", "damaged"]),
        "ledger": st.sampled_from(["whole", "gone", "empty", "tail", "damaged"]),
        "place": st.integers(1, 10**6),
        "checkpoint": st.sampled_from(CHECKPOINTS),
        "from_checkpoint": st.booleans(),
    }
)


def lose(path: Path, how: str, place: int) -> None:
    data = path.read_bytes()
    place %= max(1, len(data))
    match how:
        case "gone":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "tail":  # more often a short one
            path.write_bytes(data[: len(data) - (place % 2000 if place % 2 else place)])
        case "damaged" if data:
            path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])


def lives(directory: Path, rule: str, seed: int, losses: list[dict[str, Any]]) -> None:
    world = PoweredWorld(world_config(**SETTINGS | {"shaping": RULES[rule]}), directory)
    rng = random.Random(seed)
    for loss in losses:
        play(world, rng, loss["num_moves"])
        if rng.random() < 0.3:
            world.state._journal.begin(world.state.replayable.to_head(world.state._ledger.num_bytes))
        lose(directory / JOURNAL_FILE, loss["journal"], loss["place"])
        lose(directory / LEDGER_FILE, loss["ledger"], loss["place"] * 7)
        newest = max((v for v in world.histories if world.checkpoint(v).exists()), default=0)
        if newest and loss["checkpoint"] == "without the shaper":
            world.checkpoint(newest).write_bytes(b"")
        if newest and loss["checkpoint"] == "gone" and newest - 2 in world.histories:
            world.checkpoint(newest).unlink()
        if newest and loss["checkpoint"] == "weights damaged" and newest - 2 in world.histories:
            del world.histories[newest]
        if loss["checkpoint"] == "all gone":
            shutil.rmtree(directory / CHECKPOINTS_DIR, ignore_errors=True)
        world.power_up(from_checkpoint=loss["from_checkpoint"])
    world.run(rng)
    world.check_end()


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    rule=st.sampled_from(sorted(RULES)),
    losses=st.lists(LOSSES, min_size=1, max_size=4),
)
def test_a_run_goes_on_to_its_end_whatever_the_files_have_lost(
    seed: int, rule: str, losses: list[dict[str, Any]]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        lives(Path(directory), rule, seed, losses)


def test_a_checkpoint_that_the_learner_has_found_damaged_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is renamed after its name was read, and before its file is."""
    for version in (5, 10):
        path = tmp_path / CHECKPOINTS_DIR / f"step-{version:06d}" / SHAPER_STATE_FILE
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.parent.name == "step-000010":
            path.parent.rename(path.parent.with_name("step-000010.damaged"))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert newest_checkpoint(tmp_path) == NewestCheckpoint(5, None)
