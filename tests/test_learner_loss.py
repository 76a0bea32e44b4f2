import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from darts_async.learner.loss import policy_loss

SETTINGS = {"clip_low": 0.2, "clip_high": 0.28, "truncate_ratio": 2.0}


def loss_of(
    log_ratios: list[float], advantages: list[float], on_policy: list[bool] | None = None
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, its gradient by the log-probabilities, metrics; the behaviour log-probabilities are -1."""
    logprobs = (torch.tensor(log_ratios, dtype=torch.float64) - 1).requires_grad_()
    lag_0 = torch.tensor(on_policy if on_policy is not None else [True] * len(log_ratios))
    behaviour = torch.full_like(logprobs, -1.0)
    loss, tally = policy_loss(logprobs, behaviour, torch.tensor(advantages).double(), lag_0, **SETTINGS)
    loss.backward()
    assert logprobs.grad is not None
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


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_overflowing_ratio_stays_finite(advantage: float) -> None:
    loss, gradient, metrics = loss_of([800.0], [advantage])
    assert math.isfinite(loss.item())
    assert math.isfinite(gradient.item())
    assert all(math.isfinite(value) for value in metrics.values())


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
