"""The vLLM engine against vLLM itself: what it reports, cancellation, priority, pauses, memory for keys and values."""

from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
import torch

from darts_async.config import VllmConfig
from darts_async.errors import DeadlineError, EngineError
from darts_async.generator.engine import SampleEnd
from darts_async.generator.vllm.engine import VllmEngine
from darts_async.learner.logprobs import logits_scores
from darts_async.truncation import Truncation
from tests.generator.vllm.world import BLOCK_TOKENS, EOS, MAX_CONTEXT_TOKENS, RunningVllm, needs_vllm, running_vllm
from tests.generator.world import Record, generate, run

pytestmark = [needs_vllm, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningVllm]:
    async with running_vllm(tmp_path_factory.mktemp("model")) as running:
        yield running


async def steps(engine: VllmEngine, count: int, record: Record | None = None) -> Record:
    record = record or Record()
    for _ in range(count):
        record.add(await engine.step())
    return record


async def steps_until_all_decode(engine: VllmEngine, count: int, record: Record) -> None:
    """vLLM prefills in chunks, so samples begin at different steps."""
    while len(record.tokens) < count:
        record.add(await engine.step())


@torch.inference_mode()
def replayed(
    model: object,
    prompt: list[int],
    response: list[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> np.ndarray:
    """Log-probabilities of a response, each token's logits from one forward pass over the whole text."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature  # type: ignore[operator]
    ordered, order = logits.sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    probabilities = ordered.softmax(-1)
    ordered[probabilities.cumsum(-1) - probabilities >= top_p] = -torch.inf
    kept = torch.full_like(logits, -torch.inf).scatter(1, order, ordered)
    logprobs = kept.log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1).numpy()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.5, 7, 1.0), (1.2, 0, 0.8)]
)
async def test_logprobs_are_those_of_the_distribution_the_token_was_drawn_from(
    vllm: RunningVllm, temperature: float, top_k: int, top_p: float
) -> None:
    async with vllm.engine() as engine:
        prompts = {i: list(range(1, 4 + 5 * i)) for i in range(6)}
        for i, prompt in prompts.items():
            engine.start(
                generate(i, prompt=prompt, max_new_tokens=60, temperature=temperature, top_k=top_k, top_p=top_p)
            )
        record = await run(engine)
    assert set(record.ended) == set(prompts)
    for i, prompt in prompts.items():
        expected = replayed(vllm.model, prompt, record.tokens[i], temperature=temperature, top_k=top_k, top_p=top_p)
        np.testing.assert_allclose(record.logprobs[i], expected, atol=1e-4)


@pytest.mark.parametrize("truncation", [Truncation(7), Truncation(0, 0.8), Truncation(20, 0.95)])
async def test_at_lag_0_the_learner_says_what_vllm_said_of_truncated_samples(
    vllm: RunningVllm, truncation: Truncation
) -> None:
    sampling = {"temperature": 0.6, "top_k": truncation.top_k, "top_p": truncation.top_p}
    async with vllm.engine() as engine:
        for i in range(6):
            engine.start(generate(i, prompt=list(range(1, 4 + 5 * i)), max_new_tokens=60, **sampling))
        record = await run(engine)
    for i in range(6):
        prompt, response = list(range(1, 4 + 5 * i)), record.tokens[i]
        with torch.inference_mode():
            logits = vllm.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        scores = logits_scores(logits, torch.tensor(response), 0.6, truncation)
        np.testing.assert_allclose(record.logprobs[i], scores.logprobs, atol=1e-4)
        assert scores.outside is not None
        assert not scores.outside.any()


async def test_every_sample_ends_once_by_its_last_token_or_at_its_limit(vllm: RunningVllm) -> None:
    async with vllm.engine() as engine:
        for i in range(100):
            engine.start(generate(i, max_new_tokens=3 + i))
        record = await run(engine)
        assert engine.num_tokens_decoded == sum(len(tokens) for tokens in record.tokens.values())
    assert set(record.ended) == set(range(100))
    assert {end.finish_reason for end in record.ended.values()} == {"stop", "length"}
    for i, end in record.ended.items():
        tokens = record.tokens[i]
        assert end.num_tokens == len(tokens)
        assert EOS not in tokens[:-1]
        assert (tokens[-1] == EOS) == (end.finish_reason == "stop")
        assert end.finish_reason == "stop" or len(tokens) == 3 + i


async def test_tokens_repeat_by_seed_whatever_the_company(vllm: RunningVllm) -> None:
    async with vllm.engine() as engine:
        for i in range(8):
            engine.start(generate(i, seed=100 + i, max_new_tokens=30))
        together = await run(engine)
        engine.start(generate(50, seed=103, max_new_tokens=30))
        alone = await run(engine)
    assert alone.tokens[50] == together.tokens[3]
    assert len({tuple(tokens) for tokens in together.tokens.values()}) == 8


async def test_prompts_that_exceed_a_step_together_are_computed_over_several(vllm: RunningVllm) -> None:
    prompts = {i: [1 + (i * j) % 40 for j in range(1, 400)] for i in range(1, 25)}  # 9,576 tokens
    assert sum(map(len, prompts.values())) > 2 * vllm.started.llm.vllm_config.scheduler_config.max_num_batched_tokens
    async with vllm.engine() as engine:
        for i, prompt in prompts.items():
            engine.start(generate(i, prompt=prompt, max_new_tokens=5))
        record = await run(engine)
    assert set(record.ended) == set(prompts)
    for i in (1, 12, 24):
        expected = replayed(vllm.model, prompts[i], record.tokens[i])
        np.testing.assert_allclose(record.logprobs[i], expected, atol=1e-4)


async def test_a_cancel_at_64_in_flight_ends_the_sample_behind_its_tokens_and_frees_its_place(
    vllm: RunningVllm,
) -> None:
    async with vllm.engine(is_endless=True) as engine:
        for i in range(65):
            engine.start(generate(i, max_new_tokens=400))
        record = Record()
        await steps_until_all_decode(engine, 64, record)
        await steps(engine, 3, record)
        assert 64 not in record.tokens  # all slots are taken
        engine.cancel(17)
        events = await engine.step()
        record.add(events)
        assert events.ended == (SampleEnd(17, len(record.tokens[17]), None),)
        await steps(engine, 2, record)
        assert len(record.tokens[64]) >= 1
        assert engine.num_unfinished == 64


async def test_tokens_that_arrived_before_a_cancel_come_with_its_end(vllm: RunningVllm) -> None:
    async with vllm.engine(is_endless=True) as engine:
        engine.start(generate(0, max_new_tokens=400))
        record = await steps(engine, 2)
        while engine.llm.engine_core.outputs_queue.qsize() < 3:  # nobody takes vLLM's steps
            await engine.llm.is_paused()
        engine.cancel(0)
        events = await engine.step()
        record.add(events)
    assert len(events.token_ids) >= 3
    assert events.ended == (SampleEnd(0, len(record.tokens[0]), None),)
    np.testing.assert_allclose(record.logprobs[0], replayed(vllm.model, [5, 6, 7], record.tokens[0]), atol=1e-4)


async def test_a_cancelled_sample_leaves_no_keys_and_values_in_use(vllm: RunningVllm) -> None:
    async with vllm.engine(is_endless=True) as engine:
        for i in range(8):
            engine.start(generate(i, max_new_tokens=400))
        await steps(engine, 5)
        for i in range(8):
            engine.cancel(i)
        events = await engine.step()
        assert {end.sample_id for end in events.ended} == set(range(8))
        assert engine.num_unfinished == 0
        assert await engine.llm.reset_prefix_cache()  # vLLM refuses while any block is in use


async def test_cancels_of_waiting_unsent_unknown_and_ended_samples(vllm: RunningVllm) -> None:
    async with vllm.engine() as engine:
        engine.cancel(999)
        engine.start(generate(0, prefix=(1, 2)))
        engine.cancel(0)
        assert (await engine.step()).ended == (SampleEnd(0, 2, None),)
        engine.start(generate(1, max_new_tokens=1))
        record = await run(engine)
        engine.cancel(1)
        record.add(await engine.step())  # raises on a second end
    async with vllm.engine(is_endless=True) as engine:
        for i in range(64):
            engine.start(generate(i, max_new_tokens=400))
        engine.start(generate(70, prefix=(3, 4, 5), max_new_tokens=400))  # no slot is free
        await steps(engine, 3)
        engine.cancel(70)
        record = await steps(engine, 1)
        assert record.ended[70] == SampleEnd(70, 3, None)
        assert 70 not in record.tokens


async def test_a_sample_that_has_ended_when_its_cancel_comes_ends_once_by_itself(vllm: RunningVllm) -> None:
    async with vllm.engine(is_endless=True) as engine:
        engine.start(generate(0, max_new_tokens=4))
        engine.start(generate(1, max_new_tokens=400))
        record = await steps(engine, 1)
        while engine.llm.engine_core.outputs_queue.qsize() < 5:  # the end has arrived, and nobody took it
            await engine.llm.is_paused()
        engine.cancel(0)
        record = await steps(engine, 2, record)  # raises on a second end
        assert record.ended == {0: SampleEnd(0, 4, "length")}
        assert len(record.tokens[0]) == 4


async def test_while_paused_nothing_is_decoded_and_cancels_are_acknowledged(vllm: RunningVllm) -> None:
    async with vllm.engine(is_endless=True) as engine:
        for i in range(64):
            engine.start(generate(i, max_new_tokens=400))
        record = Record()
        await steps_until_all_decode(engine, 64, record)
        async with engine.paused():
            record.add(engine.take())
            engine.cancel(5)
            engine.start(generate(80, max_new_tokens=5))
            events = await engine.step()
            assert events.ended == (SampleEnd(5, len(record.tokens[5]), None),)
            assert len(events.token_ids) == 0
            record.add(events)
            assert len((await engine.step()).token_ids) == 0
        while 80 not in record.ended:
            record.add(await engine.step())
        expected = replayed(vllm.model, [5, 6, 7], record.tokens[9])
    np.testing.assert_allclose(record.logprobs[9], expected, atol=1e-4)


async def test_a_pause_takes_in_every_token_of_the_weights_before(vllm: RunningVllm) -> None:
    """The engine asserts for every step that its weights are those it knows; here they change while it decodes."""
    async with vllm.engine(is_endless=True) as engine:
        for i in range(16):
            engine.start(generate(i, max_new_tokens=400))
        record = Record()
        await steps_until_all_decode(engine, 16, record)
        for version in range(5):
            async with engine.paused():
                record.add(engine.take())
                await engine.set_policy_version(version)
            await steps(engine, 3, record)
        assert len(record.tokens[0]) >= 15
        assert not record.ended
        async with engine.paused():
            engine.take()
            await engine.llm.update_weight_version("default")
            engine._weights = "default"


async def test_weights_that_changed_outside_a_pause_are_noticed(vllm: RunningVllm) -> None:
    async with vllm.engine(is_endless=True) as engine:
        with pytest.raises(AssertionError, match="while paused"):
            await engine.set_policy_version(1)
        engine.start(generate(0, max_new_tokens=400))
        await engine.step()
        await engine.llm.update_weight_version("7")
        with pytest.raises(AssertionError, match="7 is not default"):
            await steps(engine, 5)
        await engine.llm.update_weight_version("default")
        engine._weights = "default"
        while not engine.llm.engine_core.outputs_queue.empty():
            engine.llm.engine_core.outputs_queue.get_nowait()


async def test_samples_computed_again_behind_a_pause_go_on_as_they_were(vllm: RunningVllm) -> None:
    async with vllm.engine(is_endless=True) as engine:
        for i in range(8):
            engine.start(generate(i, max_new_tokens=60))
        record = await steps(engine, 20)
        async with engine.paused(clear_cache=True):
            record.add(engine.take())
        record = await run(engine, record)
    for i in range(8):
        assert record.ended[i] == SampleEnd(i, 60, "length")
        np.testing.assert_allclose(record.logprobs[i], replayed(vllm.model, [5, 6, 7], record.tokens[i]), atol=1e-4)


async def test_a_group_computes_its_prompt_once_and_weights_of_another_version_share_nothing(
    vllm: RunningVllm,
) -> None:
    prompt = [1 + i % 40 for i in range(3 * BLOCK_TOKENS + 5)]
    async with vllm.engine() as engine:
        for i in range(4):
            engine.start(generate(i, prompt=prompt, max_new_tokens=2))
        await run(engine)
        assert engine.num_shared_tokens == 3 * 3 * BLOCK_TOKENS
        async with engine.paused():
            await engine.set_policy_version(8)
        engine.start(generate(10, prompt=prompt, max_new_tokens=2))
        await run(engine)
        assert engine.num_shared_tokens == 3 * 3 * BLOCK_TOKENS
        async with engine.paused():
            await engine.llm.update_weight_version("default")


async def test_a_resumed_sample_goes_first_and_continues_its_response(vllm: RunningVllm) -> None:
    async with vllm.engine(is_endless=True) as engine:
        engine.start(generate(0, max_new_tokens=40))
        whole = await run(engine)
        prefix = whole.tokens[0][:25]
        for i in range(1, 65):
            engine.start(generate(i, max_new_tokens=10 if i < 3 else 400))
        record = await steps(engine, 2)
        for i in range(65, 70):
            engine.start(generate(i, max_new_tokens=10))
        engine.start(generate(90, prefix=prefix, max_new_tokens=40, priority=-1))
        while not record.tokens.keys() & {*range(65, 70), 90}:
            record.add(await engine.step())
        assert 90 in record.tokens
        while 90 not in record.ended:
            record.add(await engine.step())
    assert record.ended[90] == SampleEnd(90, 40, "length")
    assert len(record.tokens[90]) == 15
    expected = replayed(vllm.model, [5, 6, 7], prefix + record.tokens[90])
    np.testing.assert_allclose(record.logprobs[90], expected[25:], atol=1e-4)


async def test_a_continuation_is_not_drawn_by_the_numbers_of_its_prefix(vllm: RunningVllm) -> None:
    async with vllm.engine(is_endless=True) as engine:
        for i in range(40):  # the context is the same, but half of it was decoded before
            engine.start(generate(i, prompt=(5,), prefix=(9,), max_new_tokens=2, temperature=2.0))
        continued = (await run(engine)).tokens
        for i in range(40):
            engine.start(generate(i, prompt=(5, 9), max_new_tokens=1, temperature=2.0))
        fresh = (await run(engine)).tokens
    assert np.mean([continued[i] == fresh[i] for i in range(40)]) < 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": range(1, 41), "max_new_tokens": MAX_CONTEXT_TOKENS}, f"max_context_tokens {MAX_CONTEXT_TOKENS}"),
        ({"prompt": ()}, "empty"),
        ({"prefix": (1, 2), "max_new_tokens": 2}, "max_new_tokens 2"),
        ({"prompt": (1, 48)}, "vocabulary of 48"),
        ({"temperature": 2.5}, "temperature must be in"),
    ],
)
async def test_what_cannot_be_decoded_is_rejected_with_the_reason(
    vllm: RunningVllm, change: dict[str, object], reason: str
) -> None:
    async with vllm.engine() as engine:
        engine.start(generate(1, max_new_tokens=1))
        engine.start(generate(0, **change))  # type: ignore[arg-type]
        record = await run(engine)
        assert reason in record.rejected[0]
        assert set(record.ended) == {1}
        assert engine.num_unfinished == 0


async def test_a_sample_that_just_fits_is_decoded_to_its_limit(vllm: RunningVllm) -> None:
    async with vllm.engine(is_endless=True) as engine:
        engine.start(generate(0, prompt=range(1, 41), max_new_tokens=MAX_CONTEXT_TOKENS - 40))
        record = await run(engine)
    assert record.ended[0] == SampleEnd(0, MAX_CONTEXT_TOKENS - 40, "length")


async def test_a_call_of_the_workers_returns_raises_or_runs_out_of_time(vllm: RunningVllm) -> None:
    async with vllm.engine() as engine:
        assert await engine.call_workers("get_supported_tasks", deadline_s=30) == [["generate"]]
        with pytest.raises(EngineError, match="no_such_method"):
            await engine.call_workers("no_such_method", deadline_s=30)
        with pytest.raises(DeadlineError, match=r"get_supported_tasks\(\) within 1e-09 s"):
            await engine.call_workers("get_supported_tasks", deadline_s=1e-9)
        engine.start(generate(0, max_new_tokens=2))  # none of it did the engine any harm
        assert 0 in (await run(engine)).ended


async def test_an_idle_engine_steps_at_once_with_nothing(vllm: RunningVllm) -> None:
    async with vllm.engine() as engine:
        events = await engine.step()
        assert len(events.sample_ids) == 0
        assert not events.ended


async def test_samples_that_outgrow_the_memory_for_keys_and_values_finish_all_the_same(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings = VllmConfig(block_size=BLOCK_TOKENS, kv_tokens_per_sample=64)
    async with running_vllm(tmp_path_factory.mktemp("model"), num_slots=8, settings=settings) as small:
        assert small.started.num_slots == 8
        assert small.started.llm.vllm_config.cache_config.num_gpu_blocks == 8 * 64 // BLOCK_TOKENS + 1
        async with small.engine(is_endless=True) as engine:
            for i in range(12):  # 8 slots of 64 tokens, and one sample alone may take all of them
                engine.start(generate(i, max_new_tokens=200))
            record = await run(engine)
    assert all(record.ended[i] == SampleEnd(i, 200, "length") for i in range(12))
    for i in range(12):
        np.testing.assert_allclose(record.logprobs[i], replayed(small.model, [5, 6, 7], record.tokens[i]), atol=1e-4)
