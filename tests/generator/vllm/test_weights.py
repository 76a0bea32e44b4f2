"""Weights into vLLM while it decodes: a learner in a process of its own, the real actor, real log-probabilities."""

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from darts_async.config import WeightsConfig
from darts_async.errors import EngineError
from darts_async.protocol import ProbeMeasured, UpdateFailed
from tests.generator.vllm.weights_world import Member, learner, mixed_replay, until, vllm_member
from tests.generator.vllm.world import RunningVllm, needs_vllm, running_vllm
from tests.generator.world import generate

pytestmark = [needs_vllm, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PROMPT = [5, 6, 14, 7, 8, 18]
WEIGHTS = WeightsConfig(deadline_s=20.0, bucket_bytes=1 << 14)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningVllm]:
    async with running_vllm(tmp_path_factory.mktemp("model")) as running:
        yield running


async def decodes_on(member: Member, num_tokens: int) -> None:
    target = member.num_tokens() + num_tokens
    await until(lambda: member.num_tokens() >= target)


def largest_error(sample_tokens: list[int], versions: list[int], logprobs: list[float]) -> float:
    return float(np.abs(mixed_replay(PROMPT, sample_tokens, versions) - np.array(logprobs)).max())


async def test_samples_in_flight_go_through_five_updates_with_exact_versions_and_logprobs(vllm: RunningVllm) -> None:
    async with vllm_member(vllm, "a", WEIGHTS) as member, learner(WEIGHTS) as source:
        member.joins(source)
        await source.publish(0)
        member.start(*(generate(i, prompt=PROMPT, max_new_tokens=160) for i in range(32)))
        for version in range(1, 6):
            await decodes_on(member, 32 * 12)
            report = await source.publish(version)
            assert report["members"] == ["a"]
            assert report["dropped"] == {}
        await until(lambda: len(member.samples) == 32 and all(s.reason for s in member.samples.values()))
        assert source.vllm_modules == [], "the learner needs torch alone"
    for sample in member.samples.values():
        assert sample.reason == "length"
        assert len(sample.tokens) == 160, "no token was decoded twice, so none was restarted"
        assert sample.versions == sorted(sample.versions)
        assert set(sample.versions) == set(range(6))
    for sample in list(member.samples.values())[::8]:
        assert largest_error(sample.tokens, sample.versions, sample.logprobs) < 1e-4
        wrong = [max(0, version - 1) for version in sample.versions]
        assert largest_error(sample.tokens, wrong, sample.logprobs) > 1.0


async def test_a_learner_killed_while_it_sends_costs_nothing_and_the_next_one_is_joined(vllm: RunningVllm) -> None:
    async with (
        vllm_member(vllm, "a", WEIGHTS) as member,
        learner(WEIGHTS, stall={2: 5}) as first,
        learner(WEIGHTS) as second,
    ):
        member.joins(first)
        await first.publish(1)
        member.start(*(generate(i, prompt=PROMPT, max_new_tokens=400) for i in range(4)))
        first.write("publish", 2)
        await until(lambda: first.stalled)
        first.kill()
        await until(lambda: any(isinstance(message, UpdateFailed) for message in member.said))
        member.loses_learner()
        await decodes_on(member, 40)
        member.joins(second)
        assert (await second.publish(3))["members"] == ["a"]
        await until(lambda: all(sample.reason for sample in member.samples.values()))
    for sample in member.samples.values():
        assert (sample.reason, len(sample.tokens)) == ("length", 400)
        assert set(sample.versions) == {1, 3}
        assert largest_error(sample.tokens, sample.versions, sample.logprobs) < 1e-4


async def test_a_learner_that_hangs_while_it_sends_is_left_at_the_deadline(vllm: RunningVllm) -> None:
    impatient = WEIGHTS.model_copy(update={"deadline_s": 1.0})
    async with vllm_member(vllm, "a", impatient) as member, learner(impatient, stall={2: 5}) as source:
        member.joins(source)
        await source.publish(1)
        member.start(generate(0, prompt=PROMPT, max_new_tokens=400))
        source.write("publish", 2)
        await until(lambda: source.stalled)
        source.kill(signal.SIGSTOP)
        await until(lambda: any(isinstance(message, UpdateFailed) for message in member.said))
        await until(lambda: member.samples[0].reason == "length")
        failed = next(message for message in member.said if isinstance(message, UpdateFailed))
        assert "by its deadline" in failed.error
        assert set(member.samples[0].versions) == {1}


async def test_a_direct_update_that_breaks_holds_the_samples_until_the_next_learner(vllm: RunningVllm) -> None:
    direct = WEIGHTS.model_copy(update={"receive": "direct"})
    async with vllm_member(vllm, "a", direct) as member:
        async with learner(direct, stall={2: 5}) as first:
            member.joins(first)
            await first.publish(1)
            member.start(*(generate(i, prompt=PROMPT, max_new_tokens=60) for i in range(4)))
            await decodes_on(member, 40)
            first.write("publish", 2)
            await until(lambda: first.stalled)
            first.kill()
            await until(lambda: any(isinstance(message, UpdateFailed) for message in member.said))
            member.loses_learner()
        held_at = member.num_tokens()
        async with learner(direct) as second:
            member.joins(second)
            assert member.num_tokens() == held_at, "nothing is decoded with weights that are torn"
            assert (await second.publish(3))["members"] == ["a"]
            await until(lambda: all(sample.reason for sample in member.samples.values()))
    for sample in member.samples.values():
        assert (sample.reason, len(sample.tokens)) == ("length", 60)
        assert set(sample.versions) == {1, 3}
        assert largest_error(sample.tokens, sample.versions, sample.logprobs) < 1e-4


async def test_torn_weights_that_nobody_mends_end_the_generator(vllm: RunningVllm) -> None:
    direct = WEIGHTS.model_copy(update={"receive": "direct", "torn_limit_s": 0.5})
    with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012  (raised where the generator is closed)
        async with vllm_member(vllm, "a", direct) as member, learner(direct, stall={2: 5}) as source:
            member.joins(source)
            await source.publish(1)
            source.write("publish", 2)
            await until(lambda: source.stalled)
            source.kill()
            await until(lambda: member.failure)
    assert raised.group_contains(EngineError, match="torn_limit_s")


async def test_with_reprefill_every_token_is_of_the_newest_weights_alone(vllm: RunningVllm) -> None:
    reprefill = WEIGHTS.model_copy(update={"reprefill": True})
    async with vllm_member(vllm, "a", reprefill) as member, learner(reprefill) as source:
        member.joins(source)
        await source.publish(1)
        member.start(*(generate(i, prompt=PROMPT, max_new_tokens=80) for i in range(4)))
        await decodes_on(member, 60)
        await source.publish(2)
        await until(lambda: all(sample.reason for sample in member.samples.values()))
    for sample in member.samples.values():
        first_new = sample.versions.index(2)
        of_new = mixed_replay(PROMPT, sample.tokens, [2] * len(sample.tokens))
        assert np.abs(of_new - np.array(sample.logprobs))[first_new:].max() < 1e-4


async def test_generators_in_one_group_get_the_same_version_in_one_broadcast(vllm: RunningVllm, tmp_path: Path) -> None:
    async with (
        running_vllm(tmp_path) as other,
        vllm_member(vllm, "a", WEIGHTS) as one,
        vllm_member(other, "b", WEIGHTS) as two,
        learner(WEIGHTS) as source,
    ):
        one.joins(source)
        two.joins(source)
        await until(lambda: one.said and two.said)
        assert (await source.publish(1))["members"] == ["a", "b"]
        for member in (one, two):
            member.start(generate(0, prompt=PROMPT, max_new_tokens=40))
        await until(lambda: all(0 in member.samples and member.samples[0].reason for member in (one, two)))
        for member in (one, two):
            sample = member.samples[0]
            assert set(sample.versions) == {1}
            assert largest_error(sample.tokens, sample.versions, sample.logprobs) < 1e-4


async def test_a_generator_whose_logprobs_are_not_the_learners_is_ended(vllm: RunningVllm) -> None:
    with pytest.raises(EngineError, match=r"refuses this generator: .*version 2 are .* nats"):  # noqa: PT012
        async with vllm_member(vllm, "a", WEIGHTS) as member, learner(WEIGHTS, mistake={2: 9}) as source:
            member.joins(source)
            await source.publish(1)
            member.start(generate(0, prompt=PROMPT, max_new_tokens=400))
            await until(lambda: any(isinstance(message, ProbeMeasured) for message in member.said))
            assert member.failure is None
            await source.publish(2)
            await until(lambda: member.failure)
