"""What a shaper that takes the place of another knows, and which files it accepts in which life of the run."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from darts_async.errors import DataError
from darts_async.faults import Faults
from darts_async.prompts.load import PromptSets
from darts_async.shaper.durable.journal import read_journal
from darts_async.shaper.estimates.planner import Learnt, Planner
from darts_async.shaper.ledger import scan_ledger
from darts_async.shaper.process import ShaperActor
from darts_async.telemetry import BusyClock
from darts_async.topology.plan import RunPlan
from darts_async.topology.run_files import JOURNAL_FILE, LEDGER_FILE
from darts_async.trace import Trace
from darts_async.transport import PeerUp
from darts_async.wire.encoding import decoder, encode
from tests.shaper.world import prompts, world_config


def test_what_was_learnt_is_there_when_the_run_is_taken_up_again() -> None:
    config = world_config(shaping={"redundancy": {"total": "fixed", "split": "shuffled"}, "launch": 6})
    planner = Planner(config)
    planner.history.observe(3, [10, 20, 40], [15, 80], [0.0, 1.0, 1.0])
    planner.history.observe(4, [10, 200, 400], [150, 800], [0.0, 1.0, 1.0])
    planner.num_samples([3, 4, 5])
    learnt = decoder(Learnt).decode(encode(planner.to_state()))
    restored, fresh = Planner(config, learnt), Planner(config)
    assert restored.history.length(3) == planner.history.length(3)
    assert restored.history.pass_rate(3) == planner.history.pass_rate(3)
    assert restored.to_state() == planner.to_state()
    prompts = list(range(40))
    after = planner.num_samples(prompts)
    assert restored.num_samples(prompts) == after, "the lots go on where they were"
    assert fresh.num_samples(prompts) != after


class Quiet:
    """Every link: what is sent is acknowledged."""

    def __getitem__(self, name: str) -> "Quiet":
        return self

    def num_unacknowledged(self, peer: str) -> int:
        return 0

    def forget(self, peer: str) -> None:
        pass


def actor_in(run_dir: Path, life: int = 1, **plan: Any) -> ShaperActor:
    """A shaper that has decided and recorded something."""
    runtime: Any = SimpleNamespace(
        config=world_config(),
        run_dir=run_dir,
        plan=RunPlan((), (), life=life, **plan),
        clock=BusyClock(),
        trace=Trace(),
        faults=Faults(),
        links=Quiet(),
        send=lambda *_: None,
    )
    actor = ShaperActor(runtime, PromptSets(prompts(5), prompts(1), 0, 0))
    for peer in ("learner/0", "generator/0", "reward/0"):
        actor.handle(PeerUp(link="", peer=peer, incarnation=life))
    actor.tick(0.0)
    return actor


def close(actor: ShaperActor) -> None:
    asyncio.run(actor.close())


@pytest.mark.parametrize("damage", ["gone", "empty", "flipped"])
def test_a_journal_that_is_lost_is_no_obstacle_in_another_life(tmp_path: Path, damage: str) -> None:
    close(actor_in(tmp_path, life=2))
    path = tmp_path / JOURNAL_FILE
    data = path.read_bytes()
    damaged = {"gone": None, "empty": b"", "flipped": data[:30] + bytes([data[30] ^ 1]) + data[31:]}[damage]
    path.unlink() if damaged is None else path.write_bytes(damaged)
    assert read_journal(path).head is None
    close(actor_in(tmp_path, life=3))
    head = read_journal(path).head
    assert head is not None
    assert head.place.life == 3
    assert scan_ledger(tmp_path / LEDGER_FILE).counted.lineage.holds(head.place)


def test_a_damaged_journal_is_refused_in_the_same_life(tmp_path: Path) -> None:
    close(actor_in(tmp_path))
    path = tmp_path / JOURNAL_FILE
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"is damaged from byte \d+ of {len(data)} on.*darts-launch resume {tmp_path}"):
        actor_in(tmp_path)
    close(actor_in(tmp_path, life=2))
    close(actor_in(tmp_path, life=2))
    assert read_journal(path).fault == ""


def test_a_new_journal_takes_its_place_only_when_it_was_flushed(tmp_path: Path) -> None:
    actor = actor_in(tmp_path)
    work = actor.begin_flush()
    while not actor.has_new_journal:
        actor.handle(PeerUp(link="", peer="generator/0", incarnation=1))
        actor.tick(0.0)
    work()
    actor.end_flush()
    assert actor.has_new_journal, "it came after the flush had begun"
    actor.begin_flush()()
    actor.end_flush()
    assert not actor.has_new_journal
    close(actor)
    close(actor_in(tmp_path))
