"""Ranks that are late, gone or told to leave, without models."""

import asyncio
import threading
from collections.abc import Mapping
from typing import cast

import pytest
import torch

from darts_async.errors import DeadlineError, ProcessDiedError, WeightUpdateError
from darts_async.learner.rank_leader import Team
from darts_async.learner.ranks.gather import GatheredTensors
from darts_async.learner.ranks.rank_group import RankGroup
from darts_async.learner.ranks.rank_info import RankInfo, rows_of
from darts_async.protocol import Dismiss, LeaderToRank, Prepare, RankReady, StepTallied, StoreValue
from darts_async.weights.bucket_layout import bytes_of

WHOLE = {"a": torch.arange(15.0).view(5, 3), "b": torch.arange(4.0), "c": torch.arange(2.0).view(1, 2)}


class OtherRanks:
    """Stands for a `RankGroup` of three whose other ranks send their rows when they are asked."""

    def __init__(self) -> None:
        self.rank_info = RankInfo(0, 3)
        self.deadline_s = 0.2
        self.sent: dict[int, list[torch.Tensor]] = {1: [], 2: []}

    def request(self) -> None:
        assert self.sent == {1: [], 2: []}, "asked while an answer is under way"
        for rank, queue in self.sent.items():
            rows = [tensor[slice(*rows_of(len(tensor), rank, 3))] for tensor in WHOLE.values()]
            queue += [bytes_of(local.bfloat16()) for local in rows if local.numel()]

    def receive_from(self, contents: Mapping[int, torch.Tensor]) -> None:
        for rank, content in contents.items():
            content.copy_(self.sent[rank].pop(0))


def source(others: OtherRanks, lock: threading.Lock) -> GatheredTensors:
    rows = {name: tensor[slice(*rows_of(len(tensor), 0, 3))] for name, tensor in WHOLE.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in WHOLE.items()}
    return GatheredTensors(cast(RankGroup, others), rows, shapes, torch.bfloat16, lock, others.request)


def test_the_rows_of_all_ranks_become_whole_parameters_in_the_type_of_the_run() -> None:
    gathered = source(OtherRanks(), threading.Lock())
    assert [(spec.name, spec.dtype, spec.shape) for spec in gathered.specs] == [
        ("a", "bfloat16", (5, 3)),
        ("b", "bfloat16", (4,)),
        ("c", "bfloat16", (1, 2)),
    ]
    for tensor, expected in zip(gathered.tensors(), WHOLE.values(), strict=True):
        assert tensor.equal(expected.bfloat16())


def test_an_answer_that_is_not_needed_any_more_is_heard_to_its_end() -> None:
    others, lock = OtherRanks(), threading.Lock()
    tensors = source(others, lock).tensors()
    assert next(tensors).equal(WHOLE["a"].bfloat16())
    tensors.close()
    assert others.sent == {1: [], 2: []}
    assert [tensor.shape for tensor in source(others, lock).tensors()] == [(5, 3), (4,), (1, 2)]


def test_a_second_request_waits_for_the_first_but_not_for_ever() -> None:
    others, lock = OtherRanks(), threading.Lock()
    first = source(others, lock).tensors()
    next(first)
    with pytest.raises(DeadlineError, match=r"waited 0\.2 s for the learner's ranks to send other parameters"):
        next(source(others, lock).tensors())
    first.close()


def team(sent: list[tuple[str, LeaderToRank]], deadline_s: float = 30.0) -> Team:
    def send(name: str, message: LeaderToRank) -> None:
        sent.append((name, message))

    return Team(("learner/1", "learner/2"), epoch=7, interface="127.0.0.1", send=send, deadline_s=deadline_s)


async def test_a_rank_that_does_not_come_is_named() -> None:
    waiting = team([], deadline_s=0.05)
    waiting.handle("learner/1", RankReady(0))
    with pytest.raises(DeadlineError, match=r"waited 0\.05 s for learner/2 to load the model"):
        await waiting.ready()


async def test_a_team_of_one_waits_for_nobody() -> None:
    alone = Team((), epoch=7, interface="127.0.0.1", send=lambda *_: pytest.fail("nobody is there"), deadline_s=0.05)
    alone.prepare("")
    await alone.ready()
    assert await alone.tallies(0) == []
    await alone.saved(3)
    alone.dismiss()
    alone.abort("over")
    assert alone.rank_info == RankInfo(0, 1)


async def test_what_one_rank_sets_reaches_the_others_and_not_itself() -> None:
    sent: list[tuple[str, LeaderToRank]] = []
    leading = team(sent)
    leading.handle("learner/1", StoreValue(7, "key", b"value"))
    assert sent == [("learner/2", StoreValue(7, "key", b"value"))]


async def test_the_tallies_of_a_step_are_those_of_every_other_rank() -> None:
    leading = team([])
    for step in (0, 1):
        for place, name in enumerate(("learner/1", "learner/2")):
            leading.handle(name, StepTallied(step, {"loss": float(10 * step + place)}, {"loss": 1.0}, {}, {}))
    assert [tally.sums for tally in await leading.tallies(1)] == [{"loss": 10.0}, {"loss": 11.0}]


async def test_a_lost_rank_is_fatal_until_it_is_dismissed() -> None:
    sent: list[tuple[str, LeaderToRank]] = []
    leading = team(sent)
    leading.prepare("step-000004")
    with pytest.raises(ProcessDiedError, match=r"learner/2, a rank of the learner, is gone \(killed\)"):
        leading.lost("learner/2", "killed")
    leading.dismiss()
    leading.lost("learner/2", "it left")
    assert [message for _, message in sent] == [*[Prepare(7, "step-000004")] * 2, *[Dismiss()] * 2]


async def test_an_abort_frees_a_rank_that_waits_for_the_others() -> None:
    ranks = RankGroup(RankInfo(1, 2), interface="127.0.0.1", epoch=1, send=lambda _: None, deadline_s=60.0)
    forming = asyncio.create_task(asyncio.to_thread(ranks.form, torch.device("cpu")), name="form")
    await asyncio.sleep(0)
    ranks.abort("the run is stopped")
    async with asyncio.timeout(20):
        with pytest.raises(WeightUpdateError, match="the run is stopped"):
            await forming
