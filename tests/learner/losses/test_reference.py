"""Losses and gradients of whole groups, against TRL's own loss on the same model, tokens and advantages.

TRL pads and runs the whole batch at once; here the groups stream through packed micro-batches. Both share nothing but
the model's weights.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from darts_async.advantage import group_advantages
from darts_async.config import LearnerConfig
from darts_async.learner.objective import Objective
from darts_async.protocol import TrainGroup
from tests.learner.world import make_group, packed_model, plain_logprobs, plain_model
from tests.support.byte_tokenizer import make_byte_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

TEMPERATURE = 0.7
MAX_NEW_TOKENS = 64
NONE = {"importance": "none"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # our settings, TRL's
    "dapo": ({"kind": "dapo", **NONE}, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "grpo": ({"kind": "grpo", **NONE, "clip_high": 0.3}, {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.3}),
    "dr_grpo": ({"kind": "dr_grpo", **NONE}, {"loss_type": "dr_grpo", "epsilon": 0.2}),
    "gspo": (
        {"kind": "gspo", "clip_low": 0.1, "clip_high": 0.15},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15},
    ),
    "cispo": ({"kind": "cispo", "clip_high": 0.6}, {"loss_type": "cispo", "epsilon_high": 1.6}),
}


def group_of(lengths: list[int], rewards: list[float], *, group_id: int, prompt_length: int) -> TrainGroup:
    """Sampled near the model: log-ratios of deviation 0.4, so that all bounds are met and crossed."""
    group = make_group(lengths, group_id=group_id, rewards=rewards, prompt_length=prompt_length)
    noise = np.random.default_rng(group_id).normal(0, 0.4, len(group.token_ids))
    with torch.no_grad():
        parts = [
            plain_logprobs(plain_model(), group.prompt_tokens, ids.numpy(), TEMPERATURE)
            for ids in responses(group.token_ids, group)
        ]
    group.logprobs[:] = torch.cat(parts).numpy() + noise
    return group


def responses(values: np.ndarray, group: TrainGroup) -> list[Tensor]:
    return [torch.from_numpy(part) for part in np.split(values, np.cumsum(group.num_tokens)[:-1])]


GROUPS = [
    group_of([3, 9, 1, 14], [1, 0, 0, 1], group_id=0, prompt_length=4),
    group_of([20, 2, 5], [0.5, 1, 0], group_id=1, prompt_length=7),
]


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that makes TRL's trainer of a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

    directory: Path = tmp_path_factory.mktemp("trl")

    def make(model: PreTrainedModel, **settings: Any) -> Any:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=make_byte_tokenizer(), pad_token="<|endoftext|>", eos_token="<|endoftext|>"
        )
        config = GRPOConfig(
            output_dir=str(directory),
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            temperature=TEMPERATURE,
            max_completion_length=MAX_NEW_TOKENS,
            per_device_train_batch_size=4,
            num_generations=4,
            gradient_checkpointing=False,
            **settings,
        )
        return GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * 4}),
            processing_class=tokenizer,
        )

    return make


def config_of(settings: dict[str, Any]) -> LearnerConfig:
    return LearnerConfig.model_validate({"loss": settings, "tokens_per_micro_batch": 30})


def advantages_of(group: TrainGroup, config: LearnerConfig) -> Tensor:
    advantages = group_advantages(group.rewards, group.weights, normalise=config.loss.normalise_advantage)
    return torch.from_numpy(advantages)


def padded(config: LearnerConfig) -> dict[str, Tensor]:
    """The groups as TRL's loss takes them: prompts padded on the left, completions on the right."""
    prompts = [torch.from_numpy(group.prompt_tokens).long() for group in GROUPS for _ in group.num_tokens]
    completions = [ids.long() for group in GROUPS for ids in responses(group.token_ids, group)]
    behaviour = [logprobs for group in GROUPS for logprobs in responses(group.logprobs, group)]
    mask = pad_sequence([torch.ones(len(ids)) for ids in completions], batch_first=True)
    return {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left"),
        "completion_ids": pad_sequence(completions, batch_first=True),
        "completion_mask": mask.long(),
        "advantages": torch.cat([advantages_of(group, config) for group in GROUPS]),
        "old_per_token_logps": pad_sequence(behaviour, batch_first=True),
        "num_items_in_batch": mask.sum(),
    }


def ours(settings: dict[str, Any], reference: PreTrainedModel | None = None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the groups, one after the other in micro-batches, divided once."""
    model, config = packed_model(), config_of(settings)
    objective = Objective(
        model,
        config,
        temperature=TEMPERATURE,
        baseline="group",
        max_new_tokens=MAX_NEW_TOKENS,
        reference=reference,
    )
    tallies = [objective.backward([group], lambda: None) for group in GROUPS]
    tallies[0].merge(tallies[1])
    divisor = sum(objective.denominator(group) for group in GROUPS)
    gradients = {name: weight.grad / divisor for name, weight in model.named_parameters() if weight.grad is not None}
    return tallies[0].as_floats()["loss"], gradients


def theirs(trainer: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    trainer.model.eval()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {
        name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None
    }


def assert_equal(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    assert max(gradient.abs().max() for gradient in expected[1].values()) > 1e-3
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_those_of_trl(name: str, trl: Any) -> None:
    settings, their_settings = CASES[name]
    trainer = trl(plain_model(), **their_settings)
    assert_equal(ours(settings), theirs(trainer, padded(config_of(settings))))


def test_the_entropy_bonus_equals_that_of_trl(trl: Any) -> None:
    settings, their_settings = CASES["dapo"]
    trainer = trl(plain_model(), **their_settings, entropy_coef=0.3)
    assert_equal(ours({**settings, "entropy_weight": 0.3}), theirs(trainer, padded(config_of(settings))))


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_divergence_from_a_reference_equals_that_of_trl(unbiased: bool, trl: Any) -> None:
    settings, their_settings = CASES["grpo"]
    trainer = trl(plain_model(), **their_settings, use_bias_correction_kl=unbiased)
    trainer.beta = 0.2
    inputs = padded(config_of(settings))
    other = plain_model(seed=5)
    with torch.no_grad():
        logprobs = [
            plain_logprobs(other, group.prompt_tokens, ids.numpy(), TEMPERATURE)
            for group in GROUPS
            for ids in responses(group.token_ids, group)
        ]
    inputs["ref_per_token_logps"] = pad_sequence(logprobs, batch_first=True)
    found = ours({**settings, "kl_weight": 0.2, "kl_unbiased": unbiased}, reference=packed_model(seed=5))
    assert_equal(found, theirs(trainer, inputs))


@pytest.mark.parametrize("importance", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_decoupled_ppo_equals_trl_with_its_correction_for_another_sampler(importance: str, trl: Any) -> None:
    """There too the policy at the start of the step is the proximal one, and the engine's the behaviour policy."""
    low, high = (0.5, 3.0) if importance.endswith("mask") else (None, 1.5)
    settings = {
        "kind": "decoupled_ppo",
        "proximal": "step_start",
        "importance": importance,
        "importance_low": low,
        "importance_high": high,
    }
    trainer = trl(plain_model(), **CASES["dapo"][1])
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    inputs = padded(config_of(settings))
    mask = inputs["completion_mask"]
    with torch.no_grad():
        ids, attention = (
            torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], 1) for kind in ("ids", "mask")
        )
        current, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.shape[1])
        difference = (current - inputs.pop("old_per_token_logps")) * mask
        if importance.startswith("sequence"):
            difference = difference.sum(-1, keepdim=True)
        ratio = difference.exp()
    kept = (ratio >= low) & (ratio <= high) if low is not None else True
    inputs["importance_sampling_ratio"] = ratio * kept if low is not None else ratio.clamp(max=high)
    assert_equal(ours(settings), theirs(trainer, inputs))
