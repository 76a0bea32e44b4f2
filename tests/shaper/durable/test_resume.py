"""A generator dies between the last token of a sample and the word that it was the last."""

import random
from pathlib import Path

import numpy as np
import pytest

from bench.quickstart.tokenizer import EOS
from darts_async.config import RunConfig
from darts_async.errors import ModelError
from darts_async.models.location import resolve_model_path, stop_token_ids
from darts_async.protocol import Generate, TokensDecoded
from darts_async.shaper.estimates.patience import LEAST_S
from darts_async.shaper.group import Stage
from darts_async.shaper.phases import TOLD_WITHIN_S, RunPhase
from darts_async.shaper.process import stop_tokens_of
from darts_async.topology.roles import LEARNER
from tests.shaper.world import World, world_config

STOP = 7
CAP = 3


def world_with_work(num_generators: int = 2, max_staleness: int = 1) -> World:
    """A world in which generator/0 holds samples, and every response ends at token 7 or at three tokens."""
    config = world_config(sampling={"max_new_tokens": CAP}, staleness={"max_staleness": max_staleness})
    world = World(config, num_generators, num_held_out=2)
    world.state.work.stop_token_ids = frozenset({STOP})
    while world.generators["generator/0"].inbox:
        world.receive("generator/0")
    assert len(world.generators["generator/0"].running) >= 2
    return world


def stream(world: World, sample_id: int, tokens: list[int]) -> None:
    """Tokens of a sample of generator/0 reach the shaper; nothing else of it does."""
    world.num_decoded += len(tokens)
    counts, ids = np.array([len(tokens)], np.int32), np.array([sample_id], np.int64)
    message = TokensDecoded(0, ids, counts, np.array(tokens, np.int32), np.zeros(len(tokens), np.float32))
    world.feed("generator/0", message)


def asked_to_continue(world: World) -> dict[int, list[int]]:
    """{sample: prefix} of what generators have been asked to decode behind tokens that were streamed."""
    commands = [command for generator in world.generators.values() for command in generator.inbox]
    return {c.sample_id: c.prefix_tokens.tolist() for c in commands if isinstance(c, Generate) and len(c.prefix_tokens)}


@pytest.mark.parametrize(
    ("tokens", "reason"), [([1, STOP], "stop"), ([STOP], "stop"), ([1, 2, 3], "length"), ([1, 2, STOP], "stop")]
)
def test_a_sample_whose_end_was_streamed_is_finished_and_not_continued(tokens: list[int], reason: str) -> None:
    world = world_with_work()
    complete, partial = sorted(world.generators["generator/0"].running)[:2]
    stream(world, complete, tokens)
    stream(world, partial, [STOP, 2])  # in the middle it is a token like others
    world.die("generator/0")
    world.state.validate()
    assert asked_to_continue(world) == {partial: [STOP, 2]}
    score = next(score for score in world.to_score if score.sample_id == complete)
    assert (score.token_ids.tolist(), score.finish_reason) == (tokens, reason)
    sample = world.state.work.sample(complete)
    assert sample is not None
    assert sample.stage is Stage.FINISHED


def test_a_sample_without_a_token_is_started_anew() -> None:
    world = world_with_work()
    running = set(world.generators["generator/0"].running)
    world.die("generator/0")
    commands = [command for generator in world.generators.values() for command in generator.inbox]
    assert running <= {command.sample_id for command in commands if isinstance(command, Generate)}
    assert not world.to_score


@pytest.mark.parametrize("comes_back", [True, False])
def test_no_group_is_cut_for_the_absence_of_the_only_generator(comes_back: bool) -> None:
    """Of a step of three groups two are ready; the third waits for decoding while the generator is away."""
    world = world_with_work(num_generators=1, max_staleness=0)
    rng = random.Random(3)
    patience_s = LEAST_S
    while world.state.phase is not RunPhase.TRAINING or len(world.step_groups) != 2:
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
        assert world.now_s < patience_s
    world.absorb(world.state.peer_lost("generator/0", world.now_s, is_gone=True))
    if comes_back:  # and does not go on
        world.absorb(world.state.peer_up("generator/0", 1, world.now_s))
        while world.generators["generator/0"].inbox:
            world.receive("generator/0")
    for _ in range(100):
        world.now_s += patience_s / 10
        world.absorb(world.state.tick(world.now_s))
        world.state.validate()
    assert bool(world.dropped) == comes_back


@pytest.mark.parametrize("seed", range(5))
def test_runs_with_deaths_at_the_last_token_end_and_add_up(seed: int) -> None:
    world = world_with_work()
    rng = random.Random(seed)
    for _ in range(3):
        running = sorted(world.generators["generator/0"].running)
        for sample_id in rng.sample(running, min(2, len(running))):
            left = CAP - world.generators["generator/0"].running[sample_id]
            if left > 0:
                stream(world, sample_id, [1] * (left - 1) + [STOP])
        world.die("generator/0")
        world.state.validate()
        while world.generators["generator/0"].inbox:
            world.receive("generator/0")
        world.apply("generator/0")
        while world.generators["generator/0"].inbox:
            world.receive("generator/0")
    world.run(rng)
    assert set(world.ended.values()) == {1}
    assert sum(world.finished.tokens_by_outcome.values()) == world.num_decoded


def test_the_stop_tokens_are_those_of_the_model_that_decodes() -> None:
    from darts_async.models.location import load_tokenizer

    directory = resolve_model_path("darts_async.quickstart:model")
    assert stop_token_ids(directory) == {load_tokenizer(directory).token_to_id(EOS)}
    assert stop_tokens_of(RunConfig()) == stop_token_ids(directory)
    scripted = RunConfig.model_validate({"generator": {"engine": "scripted", "script": {}}})
    assert stop_tokens_of(scripted) == frozenset()


def test_the_configuration_of_generation_goes_before_that_of_the_model(tmp_path: Path) -> None:
    assert stop_token_ids(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text('{"eos_token_id": 3, "vocab_size": 9}')
    assert stop_token_ids(tmp_path) == {3}
    (tmp_path / "generation_config.json").write_text('{"temperature": 1.0}')
    assert stop_token_ids(tmp_path) == {3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert stop_token_ids(tmp_path) == {4, 5}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        stop_token_ids(tmp_path)


def at_the_end_with_one_generator() -> World:
    """The shaper has been restarted and has heard of generator/0 only, which has done all that was left to do."""
    world = world_with_work()
    rng = random.Random(4)
    while world.state.phase is not RunPhase.EVALUATING_AFTER or not world.generators["generator/1"].running:
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
    world.absorb(world.state.restarted(world.now_s))
    other = world.generators.pop("generator/1")
    other.running = dict.fromkeys(list(other.running)[:1], 5)
    for peer in ("generator/0", "reward/0", LEARNER.first):
        world.absorb(world.state.peer_up(peer, 1, world.now_s))
    while world.moves():
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
        world.state.validate()
    assert not world.state.work.groups
    world.generators["generator/1"] = other
    return world


def test_the_end_waits_for_the_tokens_of_a_generator_that_was_not_heard_of() -> None:
    world = at_the_end_with_one_generator()
    assert world.state.phase is RunPhase.EVALUATING_AFTER
    generator = world.generators["generator/1"]
    world.absorb(world.state.peer_up("generator/1", 1, world.now_s))
    world.decode("generator/1", list(generator.running), num_tokens=2)
    assert world.state.phase is RunPhase.EVALUATING_AFTER, "it has not joined again"
    while generator.inbox:
        world.receive("generator/1")
    assert world.state.phase is RunPhase.FINISHED
    assert sum(world.finished.tokens_by_outcome.values()) == world.num_decoded


def test_the_end_does_not_wait_for_a_generator_whose_incarnation_is_over() -> None:
    world = at_the_end_with_one_generator()
    world.absorb(world.state.peer_up("generator/1", 2, world.now_s))
    assert world.state.phase is RunPhase.FINISHED


def test_the_end_does_not_wait_for_a_generator_that_is_gone() -> None:
    world = at_the_end_with_one_generator()
    world.absorb(world.state.peer_lost("generator/1", world.now_s, is_gone=True))
    assert world.state.phase is RunPhase.FINISHED


def test_the_end_waits_for_a_generator_only_so_long() -> None:
    world = at_the_end_with_one_generator()
    world.absorb(world.state.tick(world.now_s + 0.9 * TOLD_WITHIN_S))
    assert world.state.phase is RunPhase.EVALUATING_AFTER
    world.absorb(world.state.tick(world.now_s + TOLD_WITHIN_S))
    assert world.state.phase is RunPhase.FINISHED
