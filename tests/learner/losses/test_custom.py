"""Losses of the user's: what they get, what they may return, and what is said of a mistake."""

import math

import pytest
import torch
from torch import Tensor

from darts_async.config import LossConfig
from darts_async.errors import ExtensionError
from darts_async.learner.logprobs import Scores
from darts_async.learner.losses.kinds import LossInputs, try_loss
from darts_async.learner.losses.policy import policy_loss
from tests.learner.losses.test_surrogates import batch_of


def ours(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return -inputs.advantages * inputs.logprobs, {"age": inputs.staleness, "scale": torch.tensor([2.0])}


def summed(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return inputs.logprobs.sum(), {}


def bare(inputs: LossInputs) -> Tensor:
    return inputs.logprobs


def detached(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return inputs.logprobs.detach(), {}


def number(inputs: LossInputs) -> tuple[Tensor, dict[str, float]]:
    return inputs.logprobs, {"mean": 0.5}


def taken(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return inputs.logprobs, {"loss_mine": inputs.logprobs}


def wrong(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return inputs.logprobs * inputs.clip, {}  # type: ignore[attr-defined]


def config_of(name: str, **settings: object) -> LossConfig:
    return LossConfig.model_validate({"kind": f"{__name__}:{name}", **settings})


def test_it_is_summed_with_shares_and_its_metrics_are_means() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    batch = batch_of([1.0, 1.0, -1.0], staleness=[0.0, 1.0, 2.0], shares=[1.0, 0.5, 0.0])
    loss, tally = policy_loss(ours, Scores(logprobs, logprobs, logprobs), batch, config_of("ours"))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(1.0 + 0.5 * 2.0)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, -0.5, 0.0]
    assert (tally.as_floats()["age"], tally.as_floats()["scale"]) == (1.0, 2.0)


def test_the_divergence_and_the_entropy_are_added_as_to_every_loss() -> None:
    logprobs = torch.full((2,), -1.0, dtype=torch.float64, requires_grad=True)
    batch, config = batch_of([0.0, 0.0]), config_of("ours", kl_weight=0.1, kl_unbiased=False, entropy_weight=0.5)
    loss, _ = policy_loss(ours, Scores(logprobs, logprobs * 0 + 2.0, logprobs), batch, config, logprobs.detach() - 1)
    assert loss.item() == pytest.approx(2 * (0.1 * (math.exp(-1) - (-1) - 1) - 0.5 * 2.0))


def test_a_setting_is_what_the_user_has_set_and_nothing_else() -> None:
    config = config_of("ours")
    assert (config.clip_low, config.clip_high, config.importance, config.importance_high) == (None, None, "none", None)
    assert config_of("ours", clip_high=0.3, proximal="step_start").clip_high == 0.3


def test_a_loss_without_a_mistake_passes() -> None:
    try_loss(config_of("ours"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("summed", r"must return \(loss of each token \[5\], metrics\), and returned \(\[\], dict\)"),
        ("bare", r"must return .* and returned \(\[5\]\)"),
        ("detached", "has no gradient: make it depend on inputs.logprobs"),
        ("number", "has a metric 'mean' of type float; a metric is a tensor"),
        ("taken", "has a metric 'loss_mine' .* names that begin with 'loss' are taken"),
        ("wrong", "raised AttributeError on two made-up samples"),
    ],
)
def test_a_mistake_is_found_on_made_up_samples(name: str, message: str) -> None:
    with pytest.raises(ExtensionError, match=f"learner.loss.kind '{__name__}:{name}' {message}"):
        try_loss(config_of(name))


def test_what_goes_wrong_only_on_real_samples_ends_the_learner_with_the_name() -> None:
    def sometimes(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        return inputs.logprobs[:1], {}

    logprobs = torch.zeros(2, requires_grad=True)
    batch = batch_of([1.0, 1.0])
    with pytest.raises(ExtensionError, match=r"must return \(loss of each token \[2\], metrics\)"):
        policy_loss(sometimes, Scores(logprobs, logprobs, logprobs), batch, config_of("ours"))
