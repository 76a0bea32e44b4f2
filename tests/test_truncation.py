"""Truncated sampling, from the engine's draw to the learner's gradient."""

from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from darts_async import truncation as shared
from darts_async.config import LearnerConfig, RunConfig
from darts_async.generator.embedded.engine import load_embedded_engine
from darts_async.generator.engine import Engine
from darts_async.learner import logprobs as module
from darts_async.learner.logprobs import Head, Scores, head_scores, logits_scores
from darts_async.learner.model import response_scores, use_packed_attention
from darts_async.learner.objective import Objective
from darts_async.learner.packing.batch import micro_batches
from darts_async.learner.trainer_setup import make_trainer
from darts_async.models.location import resolve_model_path
from darts_async.protocol import TrainGroup
from darts_async.truncation import Truncation, kept_tokens
from tests.generator.vllm.world import needs_vllm
from tests.generator.world import decode, embedded, generate, tiny_qwen3
from tests.learner.world import make_group, packed_model, weighted

NUM_TOKENS = 20
QWEN3 = Truncation(20, 0.95)
"""What the Qwen3 models recommend."""
TRUNCATIONS = [Truncation(top_k=5), Truncation(top_p=0.8), Truncation(top_k=9, top_p=0.9)]


def kept_by_definition(probabilities: list[float], truncation: Truncation) -> set[int]:
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    order = order[: truncation.top_k or len(order)]
    total, before, kept = sum(probabilities[token] for token in order), 0.0, set()
    for token in order:
        if before < truncation.top_p * total or truncation.top_p == 1:
            kept.add(token)
        before += probabilities[token]
    return kept


@given(
    st.lists(st.floats(-9, 3), min_size=2, max_size=12, unique_by=lambda x: round(x, 2)),
    st.integers(0, 14),
    st.sampled_from([1.0, 0.95, 0.7, 0.31, 0.001]),
)
def test_the_kept_set_is_top_p_of_top_k(logits: list[float], top_k: int, top_p: float) -> None:
    truncation = Truncation(top_k, top_p)
    log_p = torch.tensor([logits], dtype=torch.float64).log_softmax(-1)
    expected = kept_by_definition(log_p[0].exp().tolist(), truncation)
    found = set(torch.nonzero(kept_tokens(log_p, truncation).mask(log_p)[0]).flatten().tolist())
    assert found == expected or not truncation.is_on


def test_a_flat_distribution_is_looked_at_as_far_as_it_is_needed() -> None:
    """More tokens weigh top_p together than are sorted at first."""
    vocab_size = 9 * shared._FIRST_LOOK
    log_p = torch.linspace(0, 1, vocab_size).log_softmax(-1)[None]
    num_kept = int(kept_tokens(log_p, Truncation(top_p=0.9)).mask(log_p).sum())
    assert num_kept == len(kept_by_definition(log_p[0].double().exp().tolist(), Truncation(top_p=0.9)))
    assert num_kept > shared._FIRST_LOOK


# --- the learner's log-probabilities ----------------------------------------------------------------------------------


def plain(hidden: Tensor, head: Head, targets: Tensor, temperature: float, truncation: Truncation) -> Scores:
    """By the definition, row by row, and autograd."""
    logits = head.linear(hidden).double() * head.scale
    if head.softcap:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    log_p = (logits / temperature).log_softmax(-1)
    of_kept = []
    for row, target in zip(log_p, targets.tolist(), strict=True):
        kept = kept_by_definition(row.exp().tolist(), truncation) | {target}
        of_kept.append(row[sorted(kept)].logsumexp(-1))
    whole = log_p.gather(-1, targets[:, None])[:, 0]
    return Scores(whole - torch.stack(of_kept), -(log_p.exp() * log_p).sum(-1), whole)


def problem() -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(NUM_TOKENS, 12, requires_grad=True), nn.Linear(12, 33), torch.randint(0, 33, (NUM_TOKENS,))


def gradients_of(function: Any, truncation: Truncation, head: Head | None = None) -> tuple[Scores, tuple[Tensor, ...]]:
    """Of all three outputs at once, each with weights of its own."""
    hidden, linear, targets = problem()
    head = Head(linear) if head is None else Head(linear, head.scale, head.softcap)
    scores = function(hidden, head, targets, 0.7, truncation)
    torch.manual_seed(1)
    loss = sum((scores[i] * torch.randn(NUM_TOKENS)).sum() for i in range(3))
    return scores, torch.autograd.grad(loss, [hidden, *linear.parameters()])


def assert_as_defined(function: Any, truncation: Truncation, head: Head | None = None) -> None:
    found, found_gradients = gradients_of(function, truncation, head)
    expected, expected_gradients = gradients_of(plain, truncation, head)
    for one, other in zip((*found[:3], *found_gradients), (*expected[:3], *expected_gradients), strict=True):
        torch.testing.assert_close(one, other.float(), atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize("num_rows", [7, 1000])
@pytest.mark.parametrize("head", [None, Head(nn.Linear(1, 1), 0.3, 2.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_truncated_rows_give_the_numbers_and_gradients_of_the_definition(
    truncation: Truncation, head: Head | None, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEWEST_ROWS", {"cpu": num_rows})
    monkeypatch.setattr(module, "_ROWS_BYTES", 1)
    assert_as_defined(head_scores, truncation, head)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_logits_that_are_held_at_once_give_the_same(truncation: Truncation) -> None:
    def at_once(hidden: Tensor, head: Head, targets: Tensor, temperature: float, truncation: Truncation) -> Scores:
        return logits_scores(head.linear(hidden), targets, temperature, truncation)

    assert_as_defined(at_once, truncation)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_compiled_truncated_rows_give_the_same(truncation: Truncation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    module._compiled.cache_clear()
    monkeypatch.setattr(module, "_FEWEST_ROWS", {"cpu": 7})
    monkeypatch.setattr(module, "_ROWS_BYTES", 1)
    assert_as_defined(partial(head_scores, compiled=True), truncation)
    module._compiled.cache_clear()


def test_a_target_that_truncation_would_not_keep_is_finite_and_said() -> None:
    head = Head(nn.Linear(4, 4, bias=False))
    head.linear.weight.data = torch.eye(4)
    hidden = torch.tensor([[0.6, 0.3, 0.06, 0.04]]).log().repeat(2, 1)
    scores = head_scores(hidden, head, torch.tensor([1, 3]), 1.0, Truncation(top_k=2))
    np.testing.assert_allclose(scores.logprobs.detach(), np.log([0.3 / 0.9, 0.04 / 0.94]), rtol=1e-5)
    assert scores.outside is not None
    assert scores.outside.tolist() == [False, True]


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_the_expected_gradient_is_that_of_the_truncated_policy(truncation: Truncation) -> None:
    """By enumeration: every token that can be drawn, as often as it is, with an advantage of its own."""
    torch.manual_seed(2)
    linear, hidden, values = nn.Linear(6, 12), torch.randn(1, 6), torch.randn(12)
    log_p = (linear(hidden)[0] / 0.7).log_softmax(-1)
    kept = sorted(kept_by_definition(log_p.exp().tolist(), truncation))
    assert 1 < len(kept) < 12
    policy = log_p[kept].softmax(-1)
    expected = torch.autograd.grad(policy @ values[kept], linear.parameters())
    scores = head_scores(hidden.repeat(len(kept), 1), Head(linear), torch.tensor(kept), 0.7, truncation)
    torch.testing.assert_close(scores.logprobs.exp(), policy)
    found = torch.autograd.grad((policy.detach() * values[kept] * scores.logprobs).sum(), linear.parameters())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


# --- ties -------------------------------------------------------------------------------------------------------------


TIED = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0, 2.0, 1.0, 0.0])
"""Logits: one of 3, one of 2, two of 1, four of 0."""


def sets_kept(truncation: Truncation) -> list[tuple[int, ...]]:
    """Every set that a sort could keep of `TIED`, whichever way it breaks ties."""
    num_kept = len(kept_by_definition(TIED.double().softmax(-1).tolist(), truncation))
    lowest = TIED.sort(descending=True).values[num_kept - 1]
    above = tuple(torch.nonzero(lowest < TIED).flatten().tolist())
    tied = torch.nonzero(lowest == TIED).flatten().tolist()
    return [(*above, *some) for some in combinations(tied, num_kept - len(above))]


@pytest.mark.parametrize(
    ("truncation", "num_sets"),
    [(Truncation(3), 2), (Truncation(4), 1), (Truncation(6), 6), (Truncation(top_p=0.8), 2), (Truncation(6, 0.95), 4)],
)
@pytest.mark.parametrize("target", [0, 1, 3, 5])
def test_tied_tokens_count_for_the_share_of_them_that_is_kept(
    truncation: Truncation, num_sets: int, target: int
) -> None:
    """Log-probability and gradient of the kept weight are the means over all sets that a sort could keep, those that
    have the target in them if any has."""
    sets = sets_kept(truncation)
    assert len(sets) == num_sets
    sets = [tokens for tokens in sets if target in tokens] or [(*tokens, target) for tokens in sets]
    logits = TIED.clone().requires_grad_()
    weights = torch.stack([logits.softmax(-1)[list(tokens)].sum() for tokens in sets])
    expected = logits.log_softmax(-1)[target] - weights.mean().log()
    np.testing.assert_allclose(weights.detach(), weights[0].detach().expand(len(sets)), rtol=1e-6)
    (expected_gradient,) = torch.autograd.grad(expected, logits)

    head = Head(nn.Linear(8, 8, bias=False))
    head.linear.weight.data = torch.eye(8)
    hidden = TIED[None].clone().requires_grad_()
    for scores in (
        head_scores(hidden, head, torch.tensor([target]), 1.0, truncation),
        logits_scores(hidden, torch.tensor([target]), 1.0, truncation),
    ):
        torch.testing.assert_close(scores.logprobs[0], expected.detach(), atol=1e-6, rtol=0)
        (gradient,) = torch.autograd.grad(scores.logprobs[0], hidden)
        torch.testing.assert_close(gradient[0], expected_gradient, atol=1e-6, rtol=0)


NUM_TIED_ROWS, TIED_VOCABULARY = 4000, 600


@pytest.mark.slow
@needs_vllm
@pytest.mark.filterwarnings("ignore")  # of its imports
@pytest.mark.parametrize("truncation", [Truncation(top_p=0.95), Truncation(top_p=0.6), Truncation(20), QWEN3])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_kept_weight_is_what_vllms_own_sampler_makes_of_logits_that_tie(
    truncation: Truncation, temperature: float
) -> None:
    """Of bf16 logits. Left out are rows whose sum is at top_p up to rounding, and those where several tokens tie for
    the last place of top_k: there vLLM's PyTorch code keeps all of them, and its kernel for GPUs as many as we."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    generator = torch.Generator().manual_seed(5)
    logits = (3 * torch.randn(NUM_TIED_ROWS, TIED_VOCABULARY, generator=generator)).bfloat16().float()
    scaled = logits / temperature
    kept = apply_top_k_top_p_pytorch(
        scaled.clone(),
        torch.full((NUM_TIED_ROWS,), truncation.top_k) if truncation.top_k else None,
        torch.full((NUM_TIED_ROWS,), truncation.top_p) if truncation.top_p < 1 else None,
    ).log_softmax(-1)
    targets = torch.multinomial(kept.exp(), 1, generator=generator)
    scores = logits_scores(logits, targets[:, 0], temperature, truncation)
    off = (scores.logprobs - kept.gather(-1, targets)[:, 0]).abs()

    order = scaled.double().sort(descending=True).values
    best = order[:, : truncation.top_k or None]
    is_clear = ((best.softmax(-1).cumsum(-1)[:, :-1] - truncation.top_p).abs() > 1e-5).all(-1)
    if truncation.top_k:
        is_clear &= order[:, truncation.top_k - 1] > order[:, truncation.top_k]
    assert is_clear.float().mean() > 0.5
    assert off[is_clear].max() < 3e-5
    assert scores.outside is not None
    assert not scores.outside[is_clear].any()
    if truncation.top_p < 1:  # what it would be with all of the tied tokens
        every = scaled.log_softmax(-1)
        every_tied = every.masked_fill(every < kept_tokens(every, truncation).edge - 1e-5, -torch.inf).logsumexp(-1)
        ours = (scores.whole - scores.logprobs)[is_clear]
        assert (every_tied[is_clear] - ours).max() > 0.004


# --- engine and learner -----------------------------------------------------------------------------------------------


async def drawn_group(truncation: Truncation, temperature: float, engine: Engine | None = None) -> TrainGroup:
    """Eight samples of the embedded engine."""
    engine = engine or embedded(num_slots=8)
    sampling = {"top_k": truncation.top_k, "top_p": truncation.top_p, "temperature": temperature}
    record = await decode(engine, *(generate(i, max_new_tokens=30, **sampling) for i in range(8)))
    tokens = [record.tokens[i] for i in range(8)]
    total = sum(map(len, tokens))
    return TrainGroup(
        group_id=0,
        step=0,
        prompt_tokens=np.array([5, 6, 7], np.int32),
        num_tokens=np.array([len(ids) for ids in tokens], np.int32),
        token_ids=np.concatenate(tokens).astype(np.int32),
        logprobs=np.concatenate([record.logprobs[i] for i in range(8)]).astype(np.float32),
        versions=np.zeros(total, np.int32),
        rewards=np.array([1, 0, 0, 1, 0, 0, 1, 0], np.float32),
        weights=np.ones(8, np.float32),
    )


async def metrics_of(truncation: Truncation, temperature: float, **loss: Any) -> dict[str, float]:
    """Of a step at lag 0."""
    model = tiny_qwen3()
    use_packed_attention(model)
    config = LearnerConfig.model_validate({"loss": loss})
    objective = Objective(
        model, config, temperature=temperature, truncation=truncation, baseline="group", max_new_tokens=30
    )
    return objective.backward([await drawn_group(truncation, temperature)], lambda: None).as_floats()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("truncation", [*TRUNCATIONS, QWEN3])
async def test_at_lag_0_the_learner_says_what_the_embedded_engine_said(
    truncation: Truncation, temperature: float
) -> None:
    metrics = await metrics_of(truncation, temperature)
    assert metrics["gap_lag0_max"] <= 1e-4
    assert metrics["outside_truncation_lag0"] == 0
    assert metrics["kept_weight"] < 1


@pytest.mark.parametrize("kind", ["gspo", "dapo", "grpo", "decoupled_ppo"])
async def test_nothing_is_clipped_on_policy_with_what_qwen3_recommends(kind: str) -> None:
    """With whole log-probabilities the ratio was the kept weight: below every clip of gspo."""
    metrics = await metrics_of(QWEN3, 0.6, kind=kind)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["clip_share_low"] == metrics["clip_share_high"] == 0
    assert metrics["gap_lag0_max"] <= 1e-4


async def test_the_divergence_from_the_model_itself_is_zero_under_truncation() -> None:
    model, reference = tiny_qwen3(), tiny_qwen3()
    use_packed_attention(model)
    use_packed_attention(reference)
    config = LearnerConfig.model_validate({"loss": {"kl_weight": 0.5}})
    objective = Objective(
        model, config, temperature=0.6, truncation=QWEN3, baseline="group", max_new_tokens=30, reference=reference
    )
    group = await drawn_group(QWEN3, 0.6)
    group.rewards[:] = 1
    metrics = objective.backward([group], lambda: None).as_floats()
    assert metrics["reference_kl"] == pytest.approx(0, abs=1e-6)
    for weight in model.parameters():
        assert weight.grad is None or weight.grad.abs().max() < 1e-4


async def test_the_settings_of_a_run_reach_the_learner() -> None:
    model_dir = resolve_model_path("darts_async.quickstart:model")
    engine = load_embedded_engine(str(model_dir), dtype="float32", num_slots=4, max_context_tokens=64)
    group = await drawn_group(QWEN3, 0.6, engine)
    run = RunConfig.model_validate({"sampling": {"top_k": 20, "top_p": 0.95, "temperature": 0.6}})
    metrics = make_trainer(run, model_dir, None).add_groups([group])
    assert metrics["gap_lag0_max"] <= 1e-4
    assert metrics["kept_weight"] < 1


def test_without_truncation_nothing_of_it_is_computed() -> None:
    (batch,) = micro_batches([weighted(make_group([3, 4]), np.ones(2, np.float32))], 100)
    scores = response_scores(packed_model(), batch, 1.0)
    assert scores.logprobs is scores.whole
    assert scores.outside is None
