"""Settings of the loss: each kind brings its own, and what cannot work is refused with the values."""

from typing import Any

import pytest
from pydantic import ValidationError

from darts_async.config import LossConfig, RunConfig
from darts_async.extensions import LOSS

KINDS = tuple(LOSS.built_in)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resolved_loss_reads_back_as_itself(kind: str) -> None:
    config = LossConfig(kind=kind)  # type: ignore[arg-type]
    assert LossConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_default_is_dapo_written_out() -> None:
    assert LossConfig() == LossConfig(kind="dapo")


def test_a_given_setting_beats_that_of_the_kind() -> None:
    config = LossConfig(kind="grpo", clip_high=0.25, normalise_advantage=False)
    assert (config.clip_low, config.clip_high, config.aggregate) == (0.2, 0.25, "sequence_mean")
    assert not config.normalise_advantage


def test_a_mask_has_the_bounds_of_its_paper() -> None:
    config = LossConfig(importance="token_mask")
    assert (config.importance_low, config.importance_high) == (0.5, 5.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "dapoo"}, ["'dapo'", "'gspo'", "dapoo"]),
        ({"kind": "cispo", "clip_low": 0.2}, ["'cispo'", "does not use", "learner.loss.clip_low", "0.2"]),
        ({"kind": "reinforce", "clip_high": 0.3}, ["'reinforce'", "does not use", "clip_high", "0.3"]),
        ({"kind": "dapo", "proximal": "step_start"}, ["'dapo'", "does not use", "proximal", "'step_start'"]),
        ({"kind": "decoupled_ppo", "proximal": None}, ["'decoupled_ppo'", "needs", "proximal"]),
        ({"kind": "gspo", "importance": "token_truncate"}, ["'gspo'", "'token_truncate'", "none, sequence_mask"]),
        ({"kind": "cispo", "importance": "sequence_truncate"}, ["'cispo'", "'sequence_truncate'"]),
        ({"importance": "none", "importance_high": 2.0}, ["'none'", "does not use", "importance_high", "2.0"]),
        ({"importance": "token_mask", "importance_low": None}, ["'token_mask'", "needs", "importance_low"]),
        ({"importance_high": 1.2}, ["importance_high (1.2)", "clip_high (1.28)", "raise importance_high"]),
        ({"reference_path": "base"}, ["'base'", "kl_weight is 0"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_values(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as error:
        LossConfig.model_validate(settings)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"max_token_staleness": 2}, ["max_token_staleness is 2", "staleness.max_staleness is 2"]),
        ({"overlong_buffer_tokens": 256}, ["overlong_buffer_tokens (256)", "sampling.max_new_tokens (256)"]),
    ],
)
def test_settings_of_other_sections_are_named(loss: dict[str, Any], words: list[str]) -> None:
    settings = {"learner": {"loss": loss}, "staleness": {"max_staleness": 2}, "sampling": {"max_new_tokens": 256}}
    with pytest.raises(ValidationError) as error:
        RunConfig.model_validate(settings)
    for word in words:
        assert word in str(error.value)
