"""A group's gradient: over ranks and micro-batches, with tokens left out, with a reference."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from darts_async.config import LearnerConfig
from darts_async.config.shaping import Baseline
from darts_async.errors import ModelError
from darts_async.learner.flops import ModelFlops
from darts_async.learner.metric_sums import Tally
from darts_async.learner.objective import Objective
from darts_async.learner.packing.tree import Tree
from darts_async.learner.ranks.rank_info import RankInfo
from darts_async.protocol import TrainGroup
from tests.learner.world import make_group, packed_model

CAP = 20
GROUP = make_group([3, 20, 1, 7, 0], rewards=[1, 0, 0, 1, 0], step=3)
GROUP.versions[:] = np.resize([1, 2, 3], len(GROUP.token_ids))


def backward(
    group: TrainGroup = GROUP,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    baseline: Baseline = "group",
    reference: PreTrainedModel | None = None,
    tokens_per_micro_batch: int = 1000,
    activation_checkpointing: bool = False,
    **loss: Any,
) -> tuple[dict[str, Tensor], Tally, int]:
    """Gradient sums, tally, and the number of backward passes."""
    model = packed_model()
    config = LearnerConfig.model_validate(
        {
            "loss": loss,
            "tokens_per_micro_batch": tokens_per_micro_batch,
            "activation_checkpointing": activation_checkpointing,
        }
    )
    objective = Objective(
        model,
        config,
        temperature=1.0,
        baseline=baseline,
        max_new_tokens=CAP,
        reference=reference,
        rank_info=RankInfo(rank, num_ranks),
    )
    passes: list[None] = []
    tally = objective.backward([group], lambda: passes.append(None))
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return gradients, tally, len(passes)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize("kind", ["dapo", "gspo"])
def test_ranks_add_up_to_one(num_ranks: int, kind: str) -> None:
    """Gradients and metrics; every rank makes as many passes as the others, even one without a sample."""
    gradients, tally, _ = backward(kind=kind)
    total: dict[str, Tensor] = {}
    merged = Tally()
    passes = set()
    for rank in range(num_ranks):
        part, part_tally, num_passes = backward(kind=kind, rank=rank, num_ranks=num_ranks, tokens_per_micro_batch=10)
        total = {name: total.get(name, torch.zeros(())) + gradient for name, gradient in part.items()}
        merged.merge(part_tally)
        passes.add(num_passes)
    assert len(passes) == 1
    assert_close(total, gradients)
    assert merged.as_floats() == pytest.approx(tally.as_floats(), rel=1e-4, abs=1e-5)


def test_tokens_left_out_have_no_gradient() -> None:
    """What the filtered sample says makes no difference; without the filter it does."""
    gradients, tally, _ = backward(overlong_filter=True)
    metrics = tally.as_floats()
    assert metrics["left_out_share"] == pytest.approx(20 / 31)
    changed = make_group([3, 20, 1, 7, 0], rewards=[1, 0, 0, 1, 0], step=3)
    changed.versions[:] = GROUP.versions
    changed.token_ids[3:23] = (changed.token_ids[3:23] + 1) % 16
    assert_close(backward(changed, overlong_filter=True)[0], gradients)
    with pytest.raises(AssertionError):
        assert_close(backward(changed)[0], backward()[0])


def test_an_overlong_response_loses_reward() -> None:
    alike = make_group([3, 20], rewards=[1, 1])
    assert not backward(alike)[0]
    gradients, tally, _ = backward(alike, overlong_buffer_tokens=5, overlong_penalty=0.5)
    assert_close(gradients, backward(make_group([3, 20], rewards=[1, 0.5]))[0])
    assert tally.as_floats()["reward_mean"] == 1.0


def test_equal_rewards_still_follow_the_reference_and_the_entropy() -> None:
    alike = make_group([3, 20], rewards=[1, 1])
    assert backward(alike, kl_weight=0.1, reference=packed_model(seed=4))[0]
    assert backward(alike, entropy_weight=0.1)[0]


def test_a_reference_that_is_the_model_itself_changes_nothing() -> None:
    gradients, tally, _ = backward(kl_weight=0.5, reference=packed_model())
    assert_close(gradients, backward()[0])
    assert tally.as_floats()["reference_kl"] == pytest.approx(0, abs=1e-6)


def test_a_reference_with_another_vocabulary_is_refused() -> None:
    other = packed_model()
    other.resize_token_embeddings(20)
    with pytest.raises(ModelError, match="a vocabulary of 20 rows, but the model in training has 16"):
        backward(kl_weight=0.5, reference=other)


def test_inclusion_weights_reach_the_divergence_and_the_entropy() -> None:
    """A weight of 2 is the sample twice, where equal rewards leave only these terms."""
    settings = {"kl_weight": 0.1, "entropy_weight": 0.2, "aggregate": "constant"}
    once, twice = make_group([3, 5], rewards=[1, 1]), make_group([3, 5, 5], rewards=[1, 1, 1])
    twice.prompt_tokens[:] = once.prompt_tokens
    for name in ("token_ids", "logprobs"):
        values = getattr(once, name)
        getattr(twice, name)[:] = np.concatenate([values, values[3:]])
    once.weights[:] = [1, 2]
    assert_close(
        backward(once, reference=packed_model(seed=4), **settings)[0],
        backward(twice, reference=packed_model(seed=4), **settings)[0],
    )


def test_a_gradient_of_gspo_knows_nothing_of_tokens_that_are_too_old() -> None:
    group = make_group([6, 5], rewards=[1, 0], step=3)
    group.versions[:3] = 1
    settings = {"kind": "gspo", "max_token_staleness": 1, "clip_low": 0.9, "clip_high": 9.0}
    gradients, tally, _ = backward(group, **settings)
    group.logprobs[:3] -= 0.7
    assert_close(backward(group, **settings)[0], gradients)
    assert tally.as_floats()["left_out_share"] == pytest.approx(3 / 11)


def test_the_mean_of_the_largest_rewards_is_finite() -> None:
    largest = float(np.finfo(np.float32).max)
    metrics = backward(make_group([3] * 8, rewards=[largest] * 8))[1].as_floats()
    assert metrics["reward_mean"] == pytest.approx(largest)


def test_rloo_is_the_policy_gradient_of_leave_one_out_advantages() -> None:
    """Rewards 1, 0, 0 and 1: baselines 1/3, 2/3, 2/3, 1/3."""
    group = make_group([3, 20, 1, 7], rewards=[1, 0, 0, 1])
    _, tally, _ = backward(group, kind="reinforce", baseline="leave_one_out")
    assert tally.as_floats()["advantage_abs_mean"] == pytest.approx(2 / 3)


def test_the_loss_is_reported_by_its_parts() -> None:
    metrics = backward(kl_weight=0.1, reference=packed_model(seed=4), entropy_weight=0.2)[1].as_floats()
    assert metrics["loss"] == pytest.approx(metrics["loss_policy"] + metrics["loss_kl"] + metrics["loss_entropy"])
    assert metrics["loss_entropy"] == pytest.approx(-0.2 * metrics["entropy"])


def test_operations_are_counted_once_and_a_group_without_gradient_costs_a_third() -> None:
    rates = []
    for rewards in ([1.0, 0.0], [1.0, 1.0]):
        model = packed_model()
        objective = Objective(model, LearnerConfig(), temperature=1.0, baseline="group", max_new_tokens=CAP)
        objective.backward([make_group([3, 20], rewards=rewards)], lambda: None)
        rates.append(objective.take_utilisation(1.0)["tflops_per_second"])
        assert objective.take_utilisation(1.0)["tflops_per_second"] == 0
    flops = ModelFlops.of(model)
    assert flops is not None
    assert rates[0] == pytest.approx(flops.training([Tree(4, (2, 19))], 23) / 1e12)
    assert rates[0] == pytest.approx(3 * rates[1])


def test_activation_checkpointing_leaves_the_gradient_alone() -> None:
    assert_close(backward(activation_checkpointing=True)[0], backward()[0])
