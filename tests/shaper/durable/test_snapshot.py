"""A shaper made of the encoded snapshot of another behaves as that one from there on, whatever happens."""

import random
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct
from pydantic import BaseModel

from darts_async.prompts.source import Prompt, ShuffledPrompts
from darts_async.shaper.outbox import Forget, Output, SendTo
from darts_async.shaper.phases import RunPhase
from darts_async.shaper.state import ShaperState, StateSnapshot
from darts_async.wire.encoding import decoder, encode
from tests.shaper.test_state import RULES, check_accounts
from tests.shaper.world import World, prompts, world_config

DERIVED = {
    "_answers": "a cache of the staleness window",
    "num_changes": "tells whether a cache is still good",
    "_used_at": "the same",
    "_rivals": "may hold groups that are not waited for any more, which are taken out when they are met",
    "_cut_at_step": "the same",
    "_order": "of an epoch, drawn when it is needed",
    "_epoch": "goes with it",
    "_waiting": "may hold samples that have been cancelled, which are passed over",
    "_unscored": "the same",
}


def copy_of(world: World, state: ShaperState) -> ShaperState:
    snapshot = decoder(StateSnapshot).decode(encode(state.to_state()))
    source = ShuffledPrompts(prompts(20), seed=1)
    return ShaperState(world.config, source, prompts(2), snapshot=snapshot)


def said(outputs: list[Output]) -> list[bytes]:
    return [
        encode([output.peer, output.message] if isinstance(output, SendTo) else output)
        if not isinstance(output, Forget)
        else output.peer.encode()
        for output in outputs
    ]


class Twins:
    """Two states that are given the same, and must answer the same."""

    def __init__(self, first: ShaperState, second: ShaperState) -> None:
        self._both = first, second

    def __getattr__(self, name: str) -> Any:
        first, second = (getattr(state, name) for state in self._both)
        return self._call(first, second) if callable(first) else first

    def _call(self, first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            outputs, others = first(*arguments, **named), second(*arguments, **named)
            assert not isinstance(outputs, list) or said(outputs) == said(others)
            return outputs

        return call


def assert_same(one: Any, other: Any, place: str, seen: set[int]) -> None:
    """Every attribute of every part, or a new one has been left out of the snapshot."""
    if id(one) in seen or callable(one):
        return
    assert type(one) is type(other), place
    if isinstance(one, np.ndarray):
        assert np.array_equal(one, other), place
    elif isinstance(one, dict):
        assert {k for k, v in one.items() if v != 0} == {k for k, v in other.items() if v != 0}, place
        for key in one.keys() & other.keys():
            assert_same(one[key], other[key], f"{place}[{key}]", seen)
    elif isinstance(one, Struct):
        for name in one.__struct_fields__:
            assert_same(getattr(one, name), getattr(other, name), f"{place}.{name}", seen)
    elif isinstance(one, (list, tuple, deque)):
        assert len(one) == len(other), place
        for number, (item, twin) in enumerate(zip(one, other, strict=True)):
            assert_same(item, twin, f"{place}[{number}]", seen)
    elif isinstance(one, (set, frozenset, str, bytes, int, float, Enum, BaseModel, type(None))):
        assert one == other, place
    else:
        seen.add(id(one))
        for name in one.__slots__ if hasattr(one, "__slots__") else vars(one):
            if name not in DERIVED:
                assert_same(getattr(one, name), getattr(other, name), f"{place}.{name}", seen)


OF_CONFIG = {
    "_batch",
    "_groups_per_step",
    "_keep",
    "_max_spares",
    "_max_staleness",
    "_memory",
    "_most",
    "_per_step",
    "_seed",
}
"""Numbers of parts that are the same for every state of a run."""


def change_numbers(part: Any, seen: set[int]) -> None:
    """Make every number that a part of the state holds a rare one."""
    is_part = type(part).__module__.startswith(("darts_async.shaper", "darts_async.prompts"))
    if not is_part or isinstance(part, Enum) or id(part) in seen:
        return
    seen.add(id(part))
    for name, value in vars(part).items() if hasattr(part, "__dict__") else ():
        if type(value) in (int, float) and name not in OF_CONFIG | DERIVED.keys():
            setattr(part, name, value + 1000)
        change_numbers(value, seen)


def some_moves(world: World, rng: random.Random, count: int) -> None:
    for _ in range(count):
        if world.state.phase is RunPhase.FINISHED or not world.moves():
            return
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
        world.absorb(world.state.tick(world.now_s))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_moves=st.integers(0, 400),
    late=st.booleans(),
    every_steps=st.integers(0, 1),
    curriculum=st.sampled_from([None, {"lowest": 0.3, "highest": 0.7, "revisit_share": 0.3}]),
)
def test_a_restored_state_is_the_same_and_answers_the_same(
    rule: str, seed: int, num_moves: int, late: bool, every_steps: int, curriculum: dict | None
) -> None:
    sections = {"staleness": {"max_staleness": 2}, "evaluation": {"every_steps": every_steps}}
    sections["prompts"] = {"curriculum": curriculum}
    world, rng = World(world_config(shaping=RULES[rule], **sections)), random.Random(seed)
    some_moves(world, rng, num_moves)
    if late:
        world.absorb(world.state.peer_lost("generator/0", world.now_s, is_gone=True))
        world.absorb(world.state.peer_lost("reward/0", world.now_s, is_gone=True))
    restored = copy_of(world, world.state)
    restored.validate()
    assert_same(world.state, restored, "state", set())
    world.state = Twins(world.state, restored)  # type: ignore[assignment]
    if late:
        world.absorb(world.state.peer_up("generator/0", 1, world.now_s))
        world.absorb(world.state.peer_up("reward/0", 1, world.now_s))
    some_moves(world, rng, 60)
    if world.state.phase is RunPhase.TRAINING:
        world.die("generator/1")
    world.run(rng)
    check_accounts(world)


def test_no_number_of_any_part_is_forgotten() -> None:
    world = World(world_config(shaping=RULES["utility"] | {"overcommit": 1.5}))
    some_moves(world, random.Random(2), 150)
    assert world.state.phase is RunPhase.TRAINING
    seen: set[int] = set()
    change_numbers(world.state, seen)
    assert len(seen) > 12, "the parts"
    assert_same(world.state, copy_of(world, world.state), "state", set())


def test_a_snapshot_holds_prompts_as_they_are() -> None:
    prompt = Prompt(3, "text", np.array([5, 6], np.int32), "answer", '{"k": 1}')
    again = decoder(Prompt).decode(encode(prompt))
    assert (again.prompt_id, again.text, again.answer, again.metadata_json) == (3, "text", "answer", '{"k": 1}')
    assert (again.token_ids.tolist(), again.token_ids.dtype) == ([5, 6], np.dtype(np.int32))
