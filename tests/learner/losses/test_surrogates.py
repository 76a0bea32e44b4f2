"""The surrogates, token by token, against numbers computed by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from darts_async.config import LossConfig
from darts_async.extensions import LOSS, load
from darts_async.learner.logprobs import Scores
from darts_async.learner.losses.policy import policy_loss, reference_kl
from darts_async.learner.packing.batch import PackedBatch

ENTROPY = 0.5


def batch_of(
    advantages: list[float],
    *,
    on_policy: list[bool] | None = None,
    staleness: list[float] | None = None,
    lengths: tuple[int, ...] | None = None,
    shares: list[float] | None = None,
    weights: list[float] | None = None,
) -> PackedBatch:
    """Response tokens alone, with behaviour log-probabilities of -1; `lengths` are those of their samples."""
    count = len(advantages)
    lengths = lengths or (1,) * count
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    none = torch.zeros(count, dtype=torch.int64)
    return PackedBatch(
        input_ids=none,
        position_ids=none,
        trees=(),
        num_samples=len(lengths),
        logit_places=none,
        targets=none,
        behaviour_logprobs=torch.full((count,), -1.0, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        shares=torch.tensor(shares if shares is not None else [1.0] * count, dtype=torch.float64),
        weights=torch.tensor(weights if weights is not None else [1.0] * count, dtype=torch.float64),
        on_policy=torch.tensor(on_policy if on_policy is not None else [True] * count),
        staleness=torch.tensor(staleness if staleness is not None else [0.0] * count, dtype=torch.float64),
        owners=owners,
    )


def loss_of(
    log_ratios: list[float],
    advantages: list[float],
    on_policy: list[bool] | None = None,
    *,
    staleness: list[float] | None = None,
    lengths: tuple[int, ...] | None = None,
    shares: list[float] | None = None,
    weights: list[float] | None = None,
    reference: list[float] | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, its gradient by the log-probabilities, metrics."""
    logprobs = (torch.tensor(log_ratios, dtype=torch.float64) - 1).requires_grad_()
    batch = batch_of(
        advantages, on_policy=on_policy, staleness=staleness, lengths=lengths, shares=shares, weights=weights
    )
    entropy = torch.full_like(logprobs, ENTROPY)
    references = None if reference is None else torch.tensor(reference, dtype=torch.float64)
    config, scores = LossConfig(**settings), Scores(logprobs, entropy, logprobs)
    loss, tally = policy_loss(load(LOSS, config.kind), scores, batch, config, references)
    loss.backward()
    assert logprobs.grad is not None
    tally.add("loss", 0.0, 1)
    return loss.detach(), logprobs.grad, tally.as_floats()


def test_at_the_behaviour_policy_the_gradient_is_minus_the_advantage() -> None:
    loss, gradient, metrics = loss_of([0.0, 0.0, 0.0], [1.5, -0.5, 0.0])
    assert loss.item() == pytest.approx(-1.0)
    torch.testing.assert_close(gradient, torch.tensor([-1.5, 0.5, 0.0]).double())
    assert metrics["ratio_mean"] == 1.0
    assert metrics["approx_kl"] == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: -t A, gradient -t A
        (1.27, 1.0, -1.27, -1.27),  # still inside: the upper bound is higher than 1 + clip_low
        (1.5, 2.0, -2.56, 0.0),  # gain clipped at 1.28
        (0.5, 2.0, -1.0, -1.0),  # a good token that became rare is never clipped
        (0.5, -2.0, 1.6, 0.0),  # gain clipped at 0.8
        (1.5, -2.0, 3.0, 3.0),  # a bad token that became likely is never clipped...
        (5.0, -2.0, 4.0, 4.0),  # ...but truncated: value and factor of the gradient are C = 2
        (5.0, 2.0, -2.56, 0.0),
    ],
)
def test_loss_and_gradient_of_a_token_equal_numbers_computed_by_hand(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    value, slope, _ = loss_of([math.log(ratio)], [advantage])
    assert value.item() == pytest.approx(loss)
    assert slope.item() == pytest.approx(gradient)


def test_tokens_are_summed_and_not_averaged() -> None:
    assert loss_of([0.0] * 3, [1.0] * 3)[0].item() == pytest.approx(3 * loss_of([0.0], [1.0])[0].item())


def test_metrics_count_what_was_clipped_and_truncated() -> None:
    log_ratios = [math.log(r) for r in (1.5, 0.5, 5.0, 1.0)]
    metrics = loss_of(log_ratios, [1.0, -1.0, -1.0, 1.0])[2]
    assert metrics["clip_share_high"] == 0.25
    assert metrics["clip_share_low"] == 0.25
    assert metrics["truncated_share"] == 0.25
    assert metrics["ratio_mean"] == pytest.approx(2.0)
    assert metrics["ratio_max"] == pytest.approx(5.0)
    assert metrics["approx_kl"] == pytest.approx(1.0 - sum(log_ratios) / 4)
    assert metrics["entropy"] == ENTROPY
    assert metrics["loss"] == pytest.approx(-1.28 + 0.8 + 2.0 - 1.0)


def test_gap_at_lag_0_is_reported_apart_from_older_tokens() -> None:
    metrics = loss_of([0.1, -0.3, 1.0, -2.0], [1.0] * 4, [True, True, False, False])[2]
    assert metrics["gap_lag0_mean"] == pytest.approx(0.2)
    assert metrics["gap_lag0_max"] == pytest.approx(0.3)
    assert metrics["gap_older_mean"] == pytest.approx(1.5)
    assert metrics["gap_older_max"] == pytest.approx(2.0)


def test_gap_of_a_lag_without_tokens_is_absent() -> None:
    metrics = loss_of([0.1], [1.0], [True])[2]
    assert "gap_older_mean" not in metrics
    assert "gap_older_max" not in metrics


KINDS = ["dapo", "grpo", "dr_grpo", "gspo", "cispo", "decoupled_ppo", "reinforce"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("log_ratio", [800.0, -800.0])
def test_extreme_ratios_stay_finite(kind: str, importance: str, log_ratio: float) -> None:
    try:
        config = LossConfig(kind=kind, importance=importance).model_dump()  # type: ignore[arg-type]
    except ValueError as error:
        assert "cannot be combined" in str(error)  # noqa: PT017
        return
    for advantage in (1.0, -1.0, 0.0):
        loss, gradient, metrics = loss_of([log_ratio], [advantage], staleness=[3.0], **config)
        assert math.isfinite(loss.item())
        assert math.isfinite(gradient.item())
        assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_is_the_policy_gradient_at_the_behaviour_policy(kind: str) -> None:
    """Three tokens of one sample, one of another: with shares of 1 the gradient is minus the advantage everywhere."""
    advantages = [1.5, 1.5, 1.5, -0.5]
    _, gradient, _ = loss_of([0.0] * 4, advantages, lengths=(3, 1), kind=kind)
    torch.testing.assert_close(gradient, -torch.tensor(advantages).double())


def test_gspo_clips_whole_samples_by_their_geometric_mean() -> None:
    """Samples of two tokens: s = sqrt(1.21) = 1.1 above the clip, and sqrt(4 / 4) = 1 within it."""
    log_ratios = [math.log(1.21), 0.0, math.log(4), -math.log(4)]
    settings = {"kind": "gspo", "clip_low": 0.05, "clip_high": 0.05, "lengths": (2, 2), "shares": [0.5] * 4}
    loss, gradient, metrics = loss_of(log_ratios, [2.0, 2.0, 3.0, 3.0], **settings)
    assert loss.item() == pytest.approx(-1.05 * 2.0 - 1.0 * 3.0)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, -1.5, -1.5]).double())
    assert metrics["clip_share_high"] == 0.5


@pytest.mark.parametrize("left_out", [0.0, 3.0, -3.0])
def test_gspo_does_not_train_the_tokens_that_are_left_out(left_out: float) -> None:
    """A sample of three tokens, one of which is too old, and a sample of which nothing is trained."""
    settings = {"kind": "gspo", "clip_low": 0.05, "clip_high": 0.05, "lengths": (3, 1), "shares": [0.0, 0.5, 0.5, 0.0]}
    loss, gradient, _ = loss_of([left_out, 0.02, -0.02, left_out], [2.0] * 3 + [1.0], **settings)
    assert loss.item() == pytest.approx(-2.0)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -1.0, -1.0, 0.0]).double())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2.0, 3.0 * 0.59453489, -3.0),  # weight 1.5; l = log 1.5 - 1 = -0.59453489
        (8.0, 2.0, -10.0 * 1.07944154, -10.0),  # weight capped at 1 + 4, and the gradient is not lost
        (0.01, -2.0, -0.02 * 5.60517019, 0.02),  # no lower bound
    ],
)
def test_cispo_weighs_the_log_probability(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    value, slope, metrics = loss_of([math.log(ratio)], [advantage], kind="cispo")
    assert value.item() == pytest.approx(loss)
    assert slope.item() == pytest.approx(gradient)
    assert metrics["truncated_share"] == (ratio > 5)


@pytest.mark.parametrize(
    ("staleness", "loss", "gradient"),
    [
        (0.0, -1.2, 0.0),  # proximal = behaviour: u = 2.25 is clipped at 1.2
        (1.0, -1.2, 0.0),
        (2.0, -1.5 * 1.2, 0.0),  # one of two versions before the proximal one: w = u = 1.5
        (3.0, -(2.25 ** (2 / 3)) * 1.2, 0.0),  # u = 2.25^(1/3) = 1.31, w = 1.717
        (5.0, -1.8 * 2.25**0.2, -1.8 * 2.25**0.2),  # u = 1.176 is within the clip, w = 1.913 capped at 1.8
    ],
)
def test_decoupled_ppo_clips_the_change_per_version(staleness: float, loss: float, gradient: float) -> None:
    settings = {"kind": "decoupled_ppo", "importance_high": 1.8}
    value, slope, _ = loss_of([math.log(2.25)], [1.0], staleness=[staleness], **settings)
    assert value.item() == pytest.approx(loss)
    assert slope.item() == pytest.approx(gradient)


def test_decoupled_ppo_from_the_start_of_the_step_is_a_weighted_policy_gradient() -> None:
    log_ratios, advantages = [math.log(r) for r in (0.5, 1.5, 5.0)], [1.0, -2.0, 3.0]
    decoupled = {"kind": "decoupled_ppo", "proximal": "step_start"}
    expected = -torch.tensor([0.5 * 1.0, 1.5 * -2.0, 2.0 * 3.0]).double()
    for settings in (decoupled, {"kind": "reinforce"}):
        torch.testing.assert_close(loss_of(log_ratios, advantages, **settings)[1], expected)


@pytest.mark.parametrize(
    ("importance", "weights", "share"),
    [
        ("none", [3.0, 0.4, 1.1, 0.9], 0.0),
        ("token_truncate", [2.0, 0.4, 1.1, 0.9], 0.25),
        ("token_mask", [3.0, 0.0, 1.1, 0.9], 0.25),  # the default band is 0.5 to 5
        ("sequence_truncate", [1.2, 1.2, 0.99, 0.99], 0.0),
        ("sequence_mask", [1.2, 1.2, 0.99, 0.99], 0.0),
    ],
)
def test_importance_bounds_the_weight_of_a_token_or_of_its_sample(
    importance: str, weights: list[float], share: float
) -> None:
    log_ratios = [math.log(r) for r in (3.0, 0.4, 1.1, 0.9)]  # products: 1.2 and 0.99
    settings = {"kind": "reinforce", "importance": importance, "lengths": (2, 2)}
    _, gradient, metrics = loss_of(log_ratios, [1.0] * 4, **settings)
    torch.testing.assert_close(gradient, -torch.tensor(weights).double())
    assert metrics.get("truncated_share", metrics.get("masked_share")) == share


def test_a_sequence_is_truncated_and_masked_as_a_whole() -> None:
    log_ratios = [math.log(r) for r in (3.0, 2.0, 0.5, 0.5)]  # products: 6 and 0.25
    for importance, weights in (("sequence_truncate", [2.0, 2.0, 0.25, 0.25]), ("sequence_mask", [0.0] * 4)):
        settings = {"kind": "reinforce", "importance": importance, "lengths": (2, 2)}
        _, gradient, _ = loss_of(log_ratios, [1.0] * 4, **settings)
        torch.testing.assert_close(gradient, -torch.tensor(weights).double())


def test_a_mask_takes_tokens_out_of_a_clipped_loss() -> None:
    log_ratios = [math.log(r) for r in (6.0, 1.1, 0.4, 0.9)]
    settings = {"kind": "dapo", "importance": "token_mask", "lengths": (2, 2)}
    loss, gradient, metrics = loss_of(log_ratios, [-1.0, -1.0, 1.0, 1.0], **settings)
    assert loss.item() == pytest.approx(1.1 - 0.9)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.1, 0.0, -0.9]).double())
    assert metrics["masked_share"] == 0.5


def test_shares_weigh_tokens_and_leave_them_out() -> None:
    loss, gradient, _ = loss_of([0.0, 0.0, 0.0], [1.0, 2.0, 4.0], shares=[0.5, 1.0, 0.0])
    assert loss.item() == pytest.approx(-2.5)
    torch.testing.assert_close(gradient, torch.tensor([-0.5, -2.0, 0.0]).double())


@pytest.mark.parametrize(
    ("unbiased", "ratio", "weight", "slope"),
    [
        (False, 3.0, 1.0, -1.0),  # r - l = log 2: k3 = 2 - log 2 - 1, slope 1 - 2
        (True, 1.0, 1.0, -math.log(2)),  # slope (1 - 2) + k3
        (True, 3.0, 2.0, -2 * math.log(2)),  # truncated at 2
    ],
)
def test_the_divergence_is_k3_and_has_its_weight(unbiased: bool, ratio: float, weight: float, slope: float) -> None:
    reference = [math.log(ratio) - 1 + math.log(2)]
    settings = {"kl_weight": 0.1, "kl_unbiased": unbiased, "reference": reference}
    loss, gradient, metrics = loss_of([math.log(ratio)], [0.0], **settings)
    k3 = 1 - math.log(2)
    assert loss.item() == pytest.approx(0.1 * weight * k3)
    assert gradient.item() == pytest.approx(0.1 * slope)
    assert metrics["reference_kl"] == pytest.approx(k3)


@given(st.floats(-8, 0), st.floats(-8, 0))
def test_the_divergence_is_never_negative(logprob: float, reference: float) -> None:
    assert reference_kl(torch.tensor(logprob).double(), torch.tensor(reference).double()) >= -1e-12


def test_a_sample_that_stands_for_others_does_so_in_every_term() -> None:
    """The advantage holds the weight already; divergence and entropy get it here."""
    reference = [-1 + math.log(2)] * 2
    settings = {"kl_weight": 0.1, "kl_unbiased": False, "entropy_weight": 0.2, "reference": reference}
    loss, gradient, metrics = loss_of([0.0, 0.0], [0.0, 0.0], weights=[0.5, 3.0], **settings)
    assert loss.item() == pytest.approx(3.5 * (0.1 * (1 - math.log(2)) - 0.2 * ENTROPY))
    torch.testing.assert_close(gradient, torch.tensor([-0.05, -0.3]).double())
    assert metrics["entropy"] == ENTROPY


def test_entropy_is_a_bonus() -> None:
    assert loss_of([0.0], [0.0], entropy_weight=0.2)[0].item() == pytest.approx(-0.2 * ENTROPY)


def test_quantiles_are_those_of_the_ratio() -> None:
    log_ratios = [math.log(0.5)] * 3 + [0.0] * 94 + [math.log(3)] * 3
    metrics = loss_of(log_ratios, [1.0] * 100)[2]
    assert metrics["ratio_p01"] == pytest.approx(0.5, rel=3e-3)
    assert metrics["ratio_p50"] == 1.0
    assert metrics["ratio_p99"] == pytest.approx(3.0, rel=3e-3)


@given(st.lists(st.tuples(st.floats(-1.5, 1.5), st.floats(-2, 2)), min_size=1, max_size=8))
def test_gradient_equals_finite_differences_below_the_truncation(tokens: list[tuple[float, float]]) -> None:
    """Above it the surrogate is deliberately not the derivative of its value."""
    kinks = [math.log(0.8), math.log(1.28)]
    tokens = [(r, a) for r, a in tokens if r < math.log(2) - 1e-3 and all(abs(r - kink) > 1e-3 for kink in kinks)]
    if not tokens:
        return
    log_ratios, advantages = ([token[i] for token in tokens] for i in (0, 1))
    gradient = loss_of(log_ratios, advantages)[1]
    for place in range(len(tokens)):
        shifted = [[r + side * 1e-6 * (i == place) for i, r in enumerate(log_ratios)] for side in (1, -1)]
        high, low = (loss_of(values, advantages)[0].item() for values in shifted)
        assert gradient[place].item() == pytest.approx((high - low) / 2e-6, abs=1e-5)
