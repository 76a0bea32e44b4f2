import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darts_async.errors import StalenessError
from darts_async.learner.packing.batch import micro_batches
from darts_async.learner.step import Trainer
from darts_async.protocol import TrainGroup
from tests.learner.world import (
    gradients,
    make_group,
    make_trainer,
    packed_model,
    plain_logprobs,
    plain_model,
    response_logprobs,
    weighted,
)

LENGTHS = ([3, 9, 1, 4], [20, 2], [6, 6, 6])
REWARDS = ([1.0, 0.0, 0.0, 1.0], [0.0, 1.0], [1.0, 1.0, 0.0])


def groups_of_a_step(step: int = 0) -> list[TrainGroup]:
    pairs = enumerate(zip(LENGTHS, REWARDS, strict=True))
    return [make_group(lengths, group_id=i, step=step, rewards=rewards) for i, (lengths, rewards) in pairs]


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name


def batch_gradient(groups: list[TrainGroup]) -> dict[str, torch.Tensor]:
    """Autograd of the loss written out token by token over plain forwards: no packing, no streaming."""
    model = plain_model()
    total = torch.zeros(())
    for group in groups:
        advantages = (group.rewards - group.rewards.mean()) / (group.rewards.std() + 1e-6)
        ends = np.cumsum(group.num_tokens)
        for end, count, advantage in zip(ends, group.num_tokens, advantages, strict=True):
            tokens = slice(end - count, end)
            logprobs = plain_logprobs(model, group.prompt_tokens, group.token_ids[tokens])
            ratio = torch.exp(logprobs - torch.from_numpy(group.logprobs[tokens]))
            ratio = ratio * (2.0 / ratio.detach()).clamp(max=1)
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum()
    total.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.permutations(range(3)), st.integers(0, 2), st.integers(1, 120))
def test_streamed_gradient_equals_the_batch_gradient(
    order: list[int], num_alone: int, tokens_per_micro_batch: int
) -> None:
    groups = groups_of_a_step()
    trainer = make_trainer(tokens_per_micro_batch=tokens_per_micro_batch)
    for place in order[:num_alone]:
        trainer.add_groups([groups[place]])
    trainer.add_groups([groups[place] for place in order[num_alone:]])
    found, expected = gradients(trainer), batch_gradient(groups)
    scale = max(gradient.abs().max() for gradient in expected.values()).item()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * scale, rtol=0)


def test_a_step_is_adamw_on_the_clipped_mean_gradient_per_token() -> None:
    trainer = make_trainer(learning_rate=0.01, weight_decay=0.1, max_grad_norm=1e-4)
    before = weights_of(trainer)
    for group in groups_of_a_step():
        trainer.add_groups([group])
    num_tokens = sum(map(sum, LENGTHS))
    mean = {name: gradient / num_tokens for name, gradient in gradients(trainer).items()}
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in mean.values()))
    metrics = trainer.finish_step()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 1e-4
    assert metrics["tokens"] == num_tokens
    for name, weight in weights_of(trainer).items():
        clipped = mean[name] * 1e-4 / norm
        expected = before[name] * (1 - 0.01 * 0.1) - 0.01 * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(weight, expected, atol=2e-5, rtol=0)


def test_groups_that_are_trained_together_are_measured_as_alone() -> None:
    groups = [*groups_of_a_step(), make_group([3, 4], group_id=9, rewards=[1.0, 1.0])]
    alone, together = make_trainer(), make_trainer()
    for group in groups:
        alone.add_groups([group])
    together.add_groups(groups)
    found, expected = together.tally.as_floats(), alone.tally.as_floats()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found["zero_advantage_share"] > 0


def test_a_step_leaves_nothing_to_the_next_one() -> None:
    trainer = make_trainer()
    trainer.add_groups([groups_of_a_step()[0]])
    trainer.finish_step()
    assert trainer.policy_version == 1
    assert not any(gradient.any() for gradient in gradients(trainer).values())


def test_equal_rewards_move_nothing_but_are_counted() -> None:
    trainer = make_trainer()
    before = weights_of(trainer)
    metrics = trainer.add_groups([make_group([3, 4], rewards=[1.0, 1.0])])
    assert metrics["zero_advantage_share"] == 1.0
    assert metrics["loss"] == 0.0
    assert metrics["entropy"] > 0
    assert trainer.finish_step()["tokens"] == 7
    assert_same(weights_of(trainer), before)


def test_inclusion_weights_scale_the_gradient_of_their_sample() -> None:
    """With the baseline of two samples at w r / sum(w), only the size of the term remains to be seen."""
    found = []
    for weights in ([1.0, 1.0], [3.0, 3.0]):
        group = make_group([3, 4], rewards=[1.0, 0.0])
        fields = {name: getattr(group, name) for name in group.__struct_fields__}
        trainer = make_trainer()
        trainer.add_groups([TrainGroup(**fields | {"weights": np.array(weights, np.float32)})])
        found.append(gradients(trainer))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], 3 * gradient, atol=1e-4, rtol=1e-4)


def test_the_rate_warms_up_linearly_and_stays() -> None:
    trainer = make_trainer(learning_rate=1.0e-3, warmup_steps=4)
    rates = []
    for step in range(6):
        trainer.add_groups([make_group([2], step=step)])
        rates.append(trainer.finish_step()["learning_rate"])
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("poison", [math.nan, -math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(poison: float) -> None:
    trainer = make_trainer()
    trainer.add_groups([groups_of_a_step()[0]])
    trainer.finish_step()
    before = {name: tensor.clone() for name, tensor in trainer.state_tensors().items()}
    bad = groups_of_a_step(step=1)[0]
    with torch.no_grad():
        weight = next(trainer.model.parameters())
        saved = weight.clone()
        weight.fill_(poison)
    trainer.add_groups([bad])
    with torch.no_grad():
        weight.copy_(saved)
    metrics = trainer.finish_step()
    assert metrics["skipped_steps"] == 1
    assert trainer.num_skipped_in_a_row == 1
    assert not math.isfinite(metrics["grad_norm"])
    assert trainer.policy_version == 2
    after = trainer.state_tensors()
    assert after.pop("counts").tolist() == [1, 1, 1]
    assert before.pop("counts").tolist() == [1, 0, 0]
    assert_same(after, before)
    trainer.add_groups([groups_of_a_step(step=2)[0]])
    assert trainer.finish_step()["skipped_steps"] == 1
    assert trainer.num_skipped_in_a_row == 0


def test_a_group_of_the_staleness_bound_is_taken_and_an_older_one_refused() -> None:
    trainer = make_trainer(max_staleness=2)
    trainer.policy_version = 5
    metrics = trainer.add_groups([make_group([3], step=5, version=3)])
    assert metrics["staleness_max"] == 2
    before = gradients(trainer)
    with pytest.raises(StalenessError, match=r"group 9 has a token of version 2 at step 5.*max_staleness is 2"):
        trainer.add_groups([make_group([3, 2], group_id=9, step=5, version=2)])
    assert_same(gradients(trainer), before)


def test_one_old_token_is_enough_to_refuse_a_group() -> None:
    group = make_group([3, 3], step=5)
    group.versions[4] = 2
    trainer = make_trainer(max_staleness=2)
    trainer.policy_version = 5
    with pytest.raises(StalenessError):
        trainer.add_groups([group])


def test_a_group_of_another_step_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="group of step 1 at version 0"):
        make_trainer().add_groups([make_group([3], step=1)])


def test_metrics_of_a_step_average_over_its_groups() -> None:
    trainer = make_trainer()
    by_group = [trainer.add_groups([group]) for group in groups_of_a_step()]
    metrics = trainer.finish_step()
    tokens = [sum(lengths) for lengths in LENGTHS]
    for name in ("entropy", "loss", "ratio_mean", "approx_kl", "gap_lag0_mean"):
        expected = sum(count * found[name] for count, found in zip(tokens, by_group, strict=True)) / sum(tokens)
        assert metrics[name] == pytest.approx(expected, rel=1e-5), name
    assert metrics["ratio_max"] == max(found["ratio_max"] for found in by_group)
    assert metrics["reward_mean"] == pytest.approx(np.mean(list(itertools.chain(*REWARDS))))
    assert all(type(value) is float for value in metrics.values())


def test_bfloat16_weights_follow_float32_masters() -> None:
    """Updates below half a unit in the last place of bfloat16 add up instead of getting lost."""
    trainer = make_trainer(packed_model(dtype=torch.bfloat16), learning_rate=1e-5)
    name = "model.layers.0.mlp.up_proj.weight"
    before = weights_of(trainer)[name]
    for step in range(3):
        trainer.add_groups([make_group([5, 9], step=step, rewards=[1, 0])])
        trainer.finish_step()
    master = trainer.state_tensors()[f"weight.{name}"]
    assert 1e-6 < (master - before).abs().max() < 1e-4
    assert weights_of(trainer)[name].dtype == torch.bfloat16
    assert weights_of(trainer)[name].equal(master.bfloat16())


class Bandit:
    """Prompts of three tokens; a response of four earns the share of its tokens that are `GOAL`."""

    GOAL = 7
    PROMPT = np.array([1, 2, 3], np.int32)

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._model = plain_model()

    def group(self, weights: dict[str, torch.Tensor], group_id: int, step: int, version: int) -> TrainGroup:
        """Eight samples decoded by a plain forward under `weights`."""
        self._model.load_state_dict(weights)
        rows = torch.from_numpy(self.PROMPT).long().repeat(8, 1)
        logprobs = []
        for _ in range(4):
            with torch.no_grad():
                log_p = self._model(input_ids=rows, use_cache=False).logits[:, -1].log_softmax(-1)
            token = torch.multinomial(log_p.exp(), 1, generator=self._random)
            logprobs.append(log_p.gather(-1, token))
            rows = torch.cat([rows, token], dim=1)
        tokens = rows[:, 3:].numpy().astype(np.int32)
        return TrainGroup(
            group_id=group_id,
            step=step,
            prompt_tokens=self.PROMPT,
            num_tokens=np.full(8, 4, np.int32),
            token_ids=tokens.ravel(),
            logprobs=torch.cat(logprobs, dim=1).numpy().ravel(),
            versions=np.full(32, version, np.int32),
            rewards=(tokens == self.GOAL).mean(1).astype(np.float32),
            weights=np.ones(8, np.float32),
        )


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 4])
def test_reward_rises_on_a_bandit_fresh_and_four_steps_old(lag: int) -> None:
    trainer, bandit = make_trainer(learning_rate=3e-3, max_staleness=4), Bandit(seed=0)
    history: list[dict[str, torch.Tensor]] = []
    rewards = []
    for step in range(40):
        history.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        version = max(0, step - lag)
        for place in range(2):
            trainer.add_groups([bandit.group(history[version], 2 * step + place, step, version)])
        metrics = trainer.finish_step()
        rewards.append(metrics["reward_mean"])
        assert metrics.get("gap_lag0_max", 0.0) < 1e-4
    assert np.mean(rewards[:2]) < 0.2
    assert np.mean(rewards[-4:]) > 0.75


def test_learner_and_plain_sampler_agree_at_lag_0() -> None:
    weights = dict(plain_model().state_dict())
    metrics = make_trainer().add_groups([Bandit(seed=1).group(weights, 0, 0, 0)])
    assert metrics["gap_lag0_max"] < 1e-5
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)


def test_temperature_of_the_trainer_is_that_of_its_logprobs() -> None:
    group = make_group([6])
    (batch,) = micro_batches([weighted(group, np.ones(1, np.float32))], 100)
    group.logprobs[:] = response_logprobs(packed_model(), batch, 0.6)[0].detach().numpy()

    def gap(temperature: float) -> float:
        return make_trainer(temperature=temperature).add_groups([group])["gap_lag0_max"]

    assert gap(0.6) < 1e-6
    assert gap(1.0) > 0.1


def test_arrays_as_they_come_off_the_wire_are_taken() -> None:
    group = make_group([3, 4], rewards=[1, 0])
    for name in group.__struct_fields__:
        if isinstance(array := getattr(group, name), np.ndarray):
            array.flags.writeable = False
    assert make_trainer().add_groups([group])["reward_mean"] == 0.5


def test_a_step_counts_what_it_computed_and_passes_without_advantages_once() -> None:
    """tflops_per_second / tokens_per_second is operations per token, whatever the time was."""

    def flops_per_token(rewards: list[float]) -> float:
        trainer = make_trainer()
        trainer.add_groups([make_group([3, 4], rewards=rewards)])
        metrics = trainer.finish_step()
        return metrics["tflops_per_second"] / metrics["tokens_per_second"]

    assert flops_per_token([1, 0]) == pytest.approx(3 * flops_per_token([1, 1]))
