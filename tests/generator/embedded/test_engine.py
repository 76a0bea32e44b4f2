"""The embedded engine against the model's own forward: log-probabilities, weights in place, models it refuses."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, MistralConfig, MistralForCausalLM

from darts_async.errors import EngineError, ModelError
from darts_async.generator.embedded.decoder import SlotDecoder
from darts_async.generator.embedded.engine import load_embedded_engine
from darts_async.protocol import sample_id_of
from tests.generator.world import EOS, TINY_MODELS, VOCAB_SIZE, Record, decode, embedded, generate, run, tiny_qwen3


@torch.inference_mode()
def plain_logprobs(model: Any, context: list[int], response: list[int], temperature: float = 1.0) -> list[float]:
    """Log-probabilities of a response by one forward of the model as it comes."""
    tokens = torch.tensor([context + response])
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(context) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1).tolist()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_MODELS)
async def test_logprobs_equal_a_plain_forward_over_mixed_freed_and_reused_slots(name: str) -> None:
    rng = np.random.default_rng(3)
    prompts = {i: rng.integers(1, VOCAB_SIZE, rng.integers(1, 20)).tolist() for i in range(40)}
    engine = embedded(TINY_MODELS[name](), num_slots=7)
    record = Record()
    for i, prompt in prompts.items():
        engine.start(generate(sample_id_of(i, 0), prompt=prompt, prefix=(4, 5, 6)[: i % 4], max_new_tokens=5 + i % 30))
        record.add(await engine.step())
        if i >= 3 and i % 3 == 0:
            engine.cancel(sample_id_of(i - 3, 0))
    record = await run(engine, record)
    await engine.close()
    assert {end.finish_reason for end in record.ended.values()} == {"stop", "length", None}
    plain = TINY_MODELS[name]()
    for i, prompt in prompts.items():
        context = prompt + [4, 5, 6][: i % 4]
        response = record.tokens.get(sample_id_of(i, 0), [])
        if response:
            expected = plain_logprobs(plain, context, response)
            np.testing.assert_allclose(record.logprobs[sample_id_of(i, 0)], expected, atol=1e-4)


async def test_logprobs_are_of_the_tempered_distribution() -> None:
    record = await decode(embedded(), generate(0, temperature=0.7, max_new_tokens=20))
    expected = plain_logprobs(tiny_qwen3(), [5, 6, 7], record.tokens[0], temperature=0.7)
    np.testing.assert_allclose(record.logprobs[0], expected, atol=1e-4)


async def test_an_end_of_sequence_token_ends_a_sample_and_is_reported() -> None:
    record = await decode(embedded(), *(generate(i, max_new_tokens=60) for i in range(12)))
    stopped = [i for i, end in record.ended.items() if end.finish_reason == "stop"]
    assert stopped
    assert all((record.tokens[i][-1] == EOS) == (i in stopped) for i in range(12))
    assert all(EOS not in record.tokens[i][:-1] for i in range(12))


def count_prefilled_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of prefilled tokens of each forward call from here on."""
    counts: list[int] = []
    original = SlotDecoder.decode

    def counting(self: SlotDecoder, prefills: Any, *arguments: Any) -> torch.Tensor:
        counts.append(sum(len(prefill.token_ids) for prefill in prefills))
        return original(self, prefills, *arguments)

    monkeypatch.setattr(SlotDecoder, "decode", counting)
    return counts


@pytest.mark.slow
async def test_a_group_is_prefilled_once_and_later_members_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedded(num_slots=3)
    counts = count_prefilled_tokens(monkeypatch)
    requests = [generate(sample_id_of(1, i), prompt=range(1, 11), max_new_tokens=4 + 3 * i) for i in range(5)]
    together = await decode(engine, *requests)
    assert sum(counts) == 9
    for request in requests:
        alone = await decode(embedded(), request)
        assert alone.tokens[request.sample_id] == together.tokens[request.sample_id]
        np.testing.assert_allclose(alone.logprobs[request.sample_id], together.logprobs[request.sample_id], atol=1e-4)


async def test_samples_with_other_prompts_or_groups_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedded()
    counts = count_prefilled_tokens(monkeypatch)
    ids = (sample_id_of(1, 0), sample_id_of(1, 1), sample_id_of(2, 0))
    prompts = ((1, 2, 3), (1, 2, 4), (1, 2, 3))
    await decode(engine, *(generate(i, prompt=prompt) for i, prompt in zip(ids, prompts, strict=True)))
    assert counts[0] == 6


async def test_new_members_of_a_group_are_prefilled_under_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedded()
    engine.start(generate(0, max_new_tokens=40, seed=1))
    await engine.step()
    await engine.apply_weights(dict(tiny_qwen3(1).named_parameters()), 1)
    counts = count_prefilled_tokens(monkeypatch)
    engine.start(generate(1))
    record = await run(engine)
    await engine.close()
    assert sum(counts) == 2
    np.testing.assert_allclose(
        record.logprobs[1], plain_logprobs(tiny_qwen3(1), [5, 6, 7], record.tokens[1]), atol=1e-4
    )


@torch.inference_mode()
def replayed_logprobs(models: list[tuple[Any, int]], prompt: list[int], response: list[int]) -> list[float]:
    """Log-probabilities of a response decoded by several models in turn over one cache of keys and values."""
    cache, tokens, fed = DynamicCache(), prompt + response, 0
    result: list[float] = []
    for model, num_decoded in models:
        last = len(prompt) + len(result) + num_decoded - 1
        output = model(input_ids=torch.tensor([tokens[fed:last]]), past_key_values=cache, use_cache=True)
        logprobs = output.logits[0, -num_decoded:].log_softmax(-1)
        result += [float(row[token]) for row, token in zip(logprobs, response[len(result) :], strict=False)]
        fed = last
    return result


async def test_running_samples_go_on_with_new_weights_over_their_old_keys() -> None:
    engine = embedded(eos=1000)
    engine.start(generate(0, max_new_tokens=15))
    record = Record()
    for _ in range(6):
        record.add(await engine.step())
    await engine.apply_weights(dict(tiny_qwen3(1).named_parameters()), 1)
    record = await run(engine, record)
    await engine.close()
    expected = replayed_logprobs([(tiny_qwen3(), 6), (tiny_qwen3(1), 9)], [5, 6, 7], record.tokens[0])
    np.testing.assert_allclose(record.logprobs[0], expected, atol=1e-4)
    assert np.abs(np.subtract(expected, plain_logprobs(tiny_qwen3(1), [5, 6, 7], record.tokens[0]))).max() > 1e-2


@pytest.mark.parametrize("drop", ["lm_head.weight", "model.embed_tokens.weight", None])
async def test_of_tied_names_either_one_or_both_may_be_given(drop: str | None) -> None:
    weights: dict[str, object] = {k: v for k, v in tiny_qwen3(1).state_dict().items() if k != drop}
    engine = embedded()
    await engine.apply_weights(weights, 1)
    record = await decode(engine, generate(0))
    np.testing.assert_allclose(
        record.logprobs[0], plain_logprobs(tiny_qwen3(1), [5, 6, 7], record.tokens[0]), atol=1e-4
    )


async def test_an_update_that_does_not_fit_names_the_tensor_and_changes_nothing() -> None:
    engine = embedded()
    name = "model.layers.1.mlp.up_proj.weight"
    good: dict[str, object] = dict(tiny_qwen3(1).named_parameters())
    wrong = {
        "without": {k: v for k, v in good.items() if k != name},
        "does not have": good | {"model.extra": torch.zeros(1)},
        "shape": good | {name: torch.zeros(2, 3)},
        "not a tensor": good | {name: np.zeros(2)},
    }
    for reason, tensors in wrong.items():
        with pytest.raises(EngineError, match=rf"version 4.*{reason}") as caught:
            await engine.apply_weights(tensors, 4)
        assert name in str(caught.value) or "model.extra" in str(caught.value)
    record = await decode(engine, generate(0))
    np.testing.assert_allclose(record.logprobs[0], plain_logprobs(tiny_qwen3(), [5, 6, 7], record.tokens[0]), atol=1e-4)


async def test_weights_that_are_not_finite_stop_the_engine_with_a_clear_error() -> None:
    engine = embedded()
    await engine.apply_weights({k: torch.full_like(v, torch.nan) for k, v in tiny_qwen3().named_parameters()}, 1)
    engine.start(generate(0))
    with pytest.raises(EngineError, match="not finite"):
        await engine.step()
    await engine.close()


async def test_token_ids_outside_the_vocabulary_are_rejected() -> None:
    engine = embedded()
    engine.start(generate(0, prompt=(1, VOCAB_SIZE)))
    engine.start(generate(1, prefix=(-1,)))
    record = await run(engine)
    await engine.close()
    assert "vocabulary of 48" in record.rejected[0]
    assert "-1 to 7" in record.rejected[1]


async def test_a_call_during_a_step_is_a_bug() -> None:
    engine = embedded()
    engine.start(generate(0))
    step = asyncio.ensure_future(engine.step())
    leave = threading.Event()
    original = engine._step

    def held() -> Any:
        assert leave.wait(10)
        return original()

    engine._step = held  # type: ignore[method-assign]
    await asyncio.sleep(0)
    with pytest.raises(AssertionError, match="during a step"):
        engine.cancel(0)
    leave.set()
    assert len((await step).token_ids) == 1
    await engine.close()


async def test_close_waits_for_a_step_whose_task_was_cancelled() -> None:
    engine = embedded()
    engine.start(generate(0))
    step = asyncio.ensure_future(engine.step())
    await asyncio.sleep(0)
    step.cancel()
    await engine.close()
    assert not any(thread.name.startswith("embedded-engine") for thread in threading.enumerate())


def test_models_with_other_kinds_of_attention_are_refused_by_name() -> None:
    windowed = MistralConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    with pytest.raises(ModelError, match="sliding window of 16"):
        embedded(MistralForCausalLM(windowed))
    with pytest.raises(ModelError, match="BloomForCausalLM does not use"):
        embedded(BloomForCausalLM(BloomConfig(vocab_size=48, hidden_size=32, n_layer=1, n_head=4)))


async def test_bfloat16_decodes_close_to_a_plain_forward() -> None:
    record = await decode(embedded(tiny_qwen3().bfloat16()), generate(0, max_new_tokens=20))
    expected = plain_logprobs(tiny_qwen3().bfloat16(), [5, 6, 7], record.tokens[0])
    np.testing.assert_allclose(record.logprobs[0], expected, atol=0.5)


@pytest.mark.slow
async def test_a_saved_model_is_loaded_with_its_end_of_sequence_token(tmp_path: Path) -> None:
    tiny_qwen3().save_pretrained(tmp_path)
    engine = load_embedded_engine(str(tmp_path), dtype="float32", num_slots=2, max_context_tokens=64)
    loaded = await decode(engine, generate(0, max_new_tokens=60))
    assert loaded.tokens == (await decode(embedded(), generate(0, max_new_tokens=60))).tokens
    with pytest.raises(ModelError, match=r"max_context_tokens is 1000, but the model was made for 256 tokens"):
        load_embedded_engine(str(tmp_path), dtype="float32", num_slots=2, max_context_tokens=1000)


def test_a_torn_weight_file_is_a_model_error(tmp_path: Path) -> None:
    tiny_qwen3().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_embedded_engine(str(tmp_path), dtype="float32", num_slots=2, max_context_tokens=64)


def test_a_path_without_a_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_embedded_engine(str(tmp_path / "none"), dtype="float32", num_slots=2, max_context_tokens=64)
