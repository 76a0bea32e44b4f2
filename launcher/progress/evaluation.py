"""Summarises an evaluation: rewards, pass@k and lengths of the held-out prompts under one policy version.

    pass@k = mean over prompts of 1 - C(n - c, k) / C(n, k)

for n samples of a prompt of which c pass. It estimates without bias the probability that one of k samples passes (Chen
et al. 2021, arXiv 2107.03374, equation 1). A sample passes with a reward above `evaluation.pass_above`. A
prompt with fewer than k scored samples is left out of pass@k.

Samples of one prompt are correlated, so the standard error of the mean reward is computed over the prompts' means.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from darts_async.protocol import EvaluationCompleted


class EvaluationSummary(msgspec.Struct, frozen=True):
    """Rewards and lengths of the held-out prompts under one version."""

    policy_version: int
    newest_version: int
    """Tokens are of versions from `policy_version` to this one, if weights were updated meanwhile."""
    num_samples: int
    reward: float
    reward_standard_error: float | None
    pass_at: dict[int, float]
    """pass@k by k: 1, 2, 4 ... up to the samples of a prompt."""
    length_mean: float
    length_std_within_prompt: float | None
    """Mean over prompts of the standard deviation of their samples' lengths."""
    length_p50: float
    length_p99: float
    num_skipped: int
    """Evaluations that became due while this one was running, and were skipped."""
    sets: "dict[str, EvaluationSummary]" = {}
    """The same of each set of prompts, if there are several: parts of a mixture, families of tasks, further sets."""
    part_metrics: dict[str, float] = {}
    """Of each of several reward functions, as in the lines of steps."""

    @property
    def headline_pass_at(self) -> dict[int, float]:
        return {k: self.pass_at[k] for k in sorted({min(self.pass_at), max(self.pass_at)})}

    def metrics(self) -> dict[str, float]:
        """The metrics by name, as in `metrics.jsonl`. Unknown ones are absent."""
        values = {
            "reward/mean": self.reward,
            "reward/standard_error": self.reward_standard_error,
            **{f"pass@{k}": value for k, value in self.pass_at.items()},
            "length/mean": self.length_mean,
            "length/std_within_prompt": self.length_std_within_prompt,
            "length/p50": self.length_p50,
            "length/p99": self.length_p99,
            **self.part_metrics,
        }
        own = {name: value for name, value in values.items() if value is not None}
        return own | {
            f"sets/{name}/{metric}": value
            for name, each in self.sets.items()
            for metric, value in each.metrics().items()
        }


class Gain(msgspec.Struct, frozen=True):
    """Reward after minus before, over the same prompts."""

    reward: float
    standard_error: float | None
    """Standard error of the mean of the paired differences between prompts."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation, sample by sample. It has at least one sample."""

    policy_version: int
    newest_version: int
    num_skipped: int
    prompt_ids: NDArray[np.int64]  # [num_samples]
    rewards: NDArray[np.float32]  # [num_samples]
    num_tokens: NDArray[np.int32]  # [num_samples]
    pass_above: float = 0.5
    prompts_by_set: Mapping[str, list[int]] = field(default_factory=dict)
    part_metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, message: EvaluationCompleted) -> Self:
        """Copies of the arrays of a message."""
        arrays = message.prompt_ids.copy(), message.rewards.copy(), message.num_tokens.copy()
        versions = message.policy_version, message.newest_version, message.num_skipped
        return cls(
            *versions,
            *arrays,
            pass_above=message.pass_above,
            prompts_by_set=message.prompts_by_set,
            part_metrics=message.part_metrics,
        )

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> Self:
        """The evaluation in a line of `metrics.jsonl`. Raises `KeyError` or `ValueError` if it is invalid."""
        return cls(
            line["policy_version"],
            line["newest_version"],
            line["num_skipped"],
            np.array(line["prompt_ids"], np.int64),
            np.array(line["rewards"], np.float32),
            np.array(line["num_tokens"], np.int32),
            pass_above=line.get("pass_above", 0.5),
            prompts_by_set=line.get("prompts_by_set", {}),
            part_metrics={name: value for name, value in line.items() if name.startswith("rewards/")},
        )

    def summary(self) -> EvaluationSummary:
        lengths = self.num_tokens
        spreads = [float(of.std(ddof=1)) for of in self._by_prompt(lengths).values() if len(of) > 1]
        return EvaluationSummary(
            policy_version=self.policy_version,
            newest_version=self.newest_version,
            num_samples=len(lengths),
            reward=float(self.rewards.mean(dtype=np.float64)),
            reward_standard_error=_standard_error(list(self.prompt_rewards().values())),
            pass_at=self._pass_at(),
            length_mean=float(lengths.mean()),
            length_std_within_prompt=float(np.mean(spreads)) if spreads else None,
            length_p50=float(np.percentile(lengths, 50)),
            length_p99=float(np.percentile(lengths, 99)),
            num_skipped=self.num_skipped,
            sets={name: each.summary() for name, each in self._by_set().items()},
            part_metrics=dict(self.part_metrics),
        )

    def _by_set(self) -> "dict[str, Evaluation]":
        """The samples of each set that has any."""
        inside = {name: np.isin(self.prompt_ids, ids) for name, ids in self.prompts_by_set.items()}
        return {
            name: replace(
                self,
                prompt_ids=self.prompt_ids[chosen],
                rewards=self.rewards[chosen],
                num_tokens=self.num_tokens[chosen],
                prompts_by_set={},
                part_metrics={},
            )
            for name, chosen in inside.items()
            if chosen.any()
        }

    def prompt_rewards(self) -> dict[int, float]:
        return {
            prompt: float(rewards.mean(dtype=np.float64)) for prompt, rewards in self._by_prompt(self.rewards).items()
        }

    def _pass_at(self) -> dict[int, float]:
        counts = [(len(of), int((of > self.pass_above).sum())) for of in self._by_prompt(self.rewards).values()]
        most = max(num_samples for num_samples, _ in counts)
        ks = [1 << power for power in range(most.bit_length())]
        return {k: float(np.mean([pass_at_k(n, c, k) for n, c in counts if n >= k])) for k in ks}

    def _by_prompt(self, values: NDArray[np.generic]) -> dict[int, NDArray[np.float64]]:
        prompts = np.unique(self.prompt_ids)
        return {int(prompt): values[self.prompt_ids == prompt].astype(np.float64) for prompt in prompts}


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The probability that one of k samples, drawn without replacement, is one of the `num_passed`."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples; k is from 1 to the number of samples")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def gain_between(before: Evaluation, after: Evaluation) -> Gain:
    """The gain between two evaluations on the same held-out prompts."""
    first, last = before.prompt_rewards(), after.prompt_rewards()
    differences = [last[prompt] - first[prompt] for prompt in first.keys() & last.keys()]
    return Gain(float(after.rewards.mean() - before.rewards.mean()), _standard_error(differences))


def evaluation_text(evaluation: EvaluationSummary) -> str:
    error = evaluation.reward_standard_error
    parts = [
        f"held-out prompts at version {evaluation.policy_version}",
        f"reward {evaluation.reward:.3f}" + (f" ± {error:.3f}" if error is not None else ""),
        *(f"pass@{k} {value:.3f}" for k, value in evaluation.headline_pass_at.items()),
        f"length {evaluation.length_mean:.1f}",
    ]
    if evaluation.newest_version > evaluation.policy_version:
        parts.append(f"versions up to {evaluation.newest_version}")
    if evaluation.num_skipped:
        parts.append(f"{evaluation.num_skipped} skipped meanwhile")
    if evaluation.sets:
        parts.append("of which " + ", ".join(f"{name} {each.reward:.3f}" for name, each in evaluation.sets.items()))
    return "  ".join(parts)


def _standard_error(values: list[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
