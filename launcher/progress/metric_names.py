"""The table of all metrics: what each is called in `metrics.jsonl`, its unit and its meaning.

The README has it as `metric_table` writes it, and `prometheus` takes units and help from it. A test holds it equal to
what real runs write. A new metric is one entry.
"""

import re
from dataclasses import dataclass, field
from typing import Final, Literal

Unit = Literal[
    "reward", "tokens", "versions", "samples", "steps", "share", "s", "bytes", "nats", "tokens/s", "TFLOP/s", ""
]
"""`share` is from 0 to 1. Empty: a number without a unit."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, or a family of them with a placeholder in braces."""

    name: str
    unit: Unit
    meaning: str
    only_if: str = ""
    """When a run has it. Empty: always."""
    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = re.split(r"\{\w+\}", self.name)
        object.__setattr__(self, "pattern", re.compile(r"[^/]+".join(map(re.escape, parts))))


_OF_SELECTED: Final = "of the samples that were trained on"
_OF_ALL: Final = "of all scored samples, those left out included"
_SETS: Final = "there are several: parts of a mixture, families of tasks, `evaluation.sets`"
_SINCE_START: Final = "since the run began"
_KL: Final = "`learner.loss.kl_weight` is above 0"
_TRUNCATED: Final = "`sampling.top_k` or `top_p` is set"
_OLD: Final = "a token was older than the step"
_SEVERAL: Final = "there are several reward functions"
_UTILITY: Final = "`shaping.redundancy.total: utility`"

STEP_METRICS: Final[tuple[Metric, ...]] = (
    Metric("reward/mean", "reward", f"mean reward {_OF_SELECTED}"),
    Metric("reward/pool_mean", "reward", f"mean reward {_OF_ALL}: the curve to look at"),
    Metric("reward/failed_share", "share", "samples whose reward failed, which is not a reward of 0"),
    Metric(
        "reward/length_covariance", "", "covariance of reward and length in a group; below 0, responses get shorter"
    ),
    Metric("rewards/{function}/mean", "reward", f"mean of one reward function, {_OF_ALL}", _SEVERAL),
    Metric("rewards/{function}/std", "reward", "its standard deviation", _SEVERAL),
    Metric("length/mean", "tokens", f"mean length {_OF_SELECTED}"),
    Metric("length/p50", "tokens", f"median length {_OF_SELECTED}"),
    Metric("length/p99", "tokens", f"99th percentile of the lengths {_OF_SELECTED}"),
    Metric("length/pool_mean", "tokens", f"mean length {_OF_ALL}"),
    Metric("length/pool_p50", "tokens", f"median length {_OF_ALL}"),
    Metric("length/pool_p99", "tokens", f"99th percentile of the lengths {_OF_ALL}"),
    Metric("groups/kept_mean", "samples", "samples that were selected, mean per group"),
    Metric("groups/zero_advantage_share", "share", "groups whose selected samples all have the same reward"),
    Metric("groups/pool_zero_advantage_share", "share", "groups whose scored samples all have the same reward"),
    Metric("groups/baseline_shift", "reward", "mean reward of the selected minus that of all scored, mean over groups"),
    Metric("staleness/mean", "versions", "age of the oldest token of a sample, mean over samples"),
    Metric("staleness/max", "versions", "age of the oldest token of the step"),
    Metric(
        "selection/length_slope", "reward", "reward for each relative unit of length, within a group", "lengths differ"
    ),
    Metric("selection/pays_for_length", "", "what the selection adds to that: 0 is neutral", "lengths differ"),
    Metric("weights/effective_share", "share", "effective number of samples by their weights, divided by their number"),
    Metric("weights/total_s", "s", "broadcast of the weights of this step, from its beginning to its end"),
    Metric("weights/transfer_s", "s", "of that, while bytes travel"),
    Metric("weights/stall_s", "s", "longest pause of decoding in one generator for it"),
    Metric("weights/num_bytes", "bytes", "size of the broadcast"),
    Metric("redundancy/mean", "samples", "samples generated per prompt, mean"),
    Metric("redundancy/launched_{n}", "", "groups that were generated with n samples"),
    Metric("redundancy/target", "samples", "samples per prompt that the plan aims at", _UTILITY),
    Metric("redundancy/elasticity", "", "per cent by which decoding slows for one per cent more samples", _UTILITY),
    Metric("redundancy/typical_spread", "", "relative spread of the lengths of a prompt", _UTILITY),
    Metric("tokens/{outcome}", "tokens", f"decoded tokens by what became of their sample, {_SINCE_START}"),
    Metric(
        "prompts/passed_over",
        "",
        f"draws that the curriculum has passed over, {_SINCE_START}",
        "`prompts.curriculum` is set",
    ),
    Metric("run/failed_rewards", "samples", f"rewards that failed, {_SINCE_START}"),
    Metric("run/groups_not_shown", "", f"groups whose rollouts could not be kept, {_SINCE_START}"),
    Metric("run/pays_for_length", "", f"`selection/pays_for_length`, {_SINCE_START}", "lengths differ"),
    Metric("run/survival_{difficulty}", "share", "groups that were completed, by the pass rate of their prompt so far"),
    Metric(
        "run/censored_{difficulty}", "share", "samples that were cut short, by the pass rate of their prompt so far"
    ),
    Metric(
        "run/redundancy_autocorrelation", "", "how samples per prompt go with those of its last visit", "prompts return"
    ),
    Metric("learner/loss", "", "the loss, summed over its parts"),
    Metric("learner/loss_policy", "", "the part of the policy gradient"),
    Metric("learner/loss_kl", "", "the part of the KL penalty", _KL),
    Metric("learner/loss_entropy", "", "the part of the entropy bonus", "`learner.loss.entropy_weight` is above 0"),
    Metric("learner/grad_norm", "", "norm of the gradient before it is clipped; absent if it is not finite"),
    Metric("learner/learning_rate", "", "rate of this step"),
    Metric("learner/skipped_steps", "steps", f"steps whose gradient was not finite, {_SINCE_START}"),
    Metric("learner/entropy", "nats", "entropy of the policy, mean over tokens"),
    Metric("learner/reference_kl", "nats", "divergence from the reference model, mean over tokens", _KL),
    Metric("learner/approx_kl", "nats", "divergence of the policy from the one that decoded, mean over tokens"),
    Metric("learner/ratio_mean", "", "probability of a token now, divided by that when it was decoded: mean"),
    Metric("learner/ratio_max", "", "the largest of these"),
    Metric("learner/ratio_p{percent}", "", "their quantiles p01, p50 and p99"),
    Metric(
        "learner/gap_lag0_mean", "nats", "difference of engine and learner for tokens of this version, mean: rounding"
    ),
    Metric("learner/gap_lag0_max", "nats", "the largest of these"),
    Metric("learner/gap_older_mean", "nats", "the same for older tokens: how far the policy has moved, mean", _OLD),
    Metric("learner/gap_older_max", "nats", "the largest of these", _OLD),
    Metric("learner/clip_share_high", "share", "tokens that the loss clips at the upper end", "the loss clips"),
    Metric("learner/clip_share_low", "share", "tokens that the loss clips at the lower end", "the loss clips"),
    Metric("learner/truncated_share", "share", "tokens whose ratio was bounded", "`importance` truncates"),
    Metric("learner/masked_share", "share", "tokens that were left out for their ratio", "`importance` masks"),
    Metric("learner/kept_weight", "share", "probability that truncated sampling keeps, mean over tokens", _TRUNCATED),
    Metric("learner/outside_truncation_lag0", "share", "fresh tokens that the learner would not have kept", _TRUNCATED),
    Metric("learner/outside_truncation_older", "share", "the same for older tokens", f"{_TRUNCATED}, and {_OLD}"),
    Metric("learner/advantage_abs_mean", "", "size of an advantage, mean over samples"),
    Metric("learner/advantage_token_mean", "", "advantage, mean over tokens; below 0, responses get shorter"),
    Metric("learner/zero_advantage_share", "share", "groups without any advantage, which have no gradient"),
    Metric("learner/left_out_share", "share", "samples that the loss leaves out"),
    Metric("learner/reward_mean", "reward", f"mean reward {_OF_SELECTED}, as the learner has them"),
    Metric("learner/staleness_mean", "versions", "age of a token, mean over tokens"),
    Metric("learner/staleness_max", "versions", "age of the oldest token"),
    Metric("learner/tokens", "tokens", "response tokens of the step"),
    Metric("learner/tokens_per_second", "tokens/s", "the same for each second in which the learner computed"),
    Metric("learner/tflops_per_second", "TFLOP/s", "operations for each of these seconds", "its operations are known"),
    Metric("learner/mfu", "share", "the same, as a share of what the GPU can do", "the GPU is known"),
    Metric("learner/idle_share", "share", "time in which the learner waited"),
    Metric("learner/memory_peak_bytes", "bytes", "peak of memory: of the GPU's allocator, else of the process"),
)
"""Of lines whose `type` is `step`. A loss of the user's adds `learner/NAME` for each of its own."""

EVALUATION_METRICS: Final[tuple[Metric, ...]] = (
    Metric("reward/mean", "reward", "mean reward of the samples of held-out prompts"),
    Metric("reward/standard_error", "reward", "its standard error, over prompts", "there are two prompts"),
    Metric("rewards/{function}/mean", "reward", "mean of one reward function", _SEVERAL),
    Metric("rewards/{function}/std", "reward", "its standard deviation", _SEVERAL),
    Metric("pass@{k}", "share", "probability that one of k samples passes, mean over prompts"),
    Metric("length/mean", "tokens", "mean length"),
    Metric("length/std_within_prompt", "tokens", "spread of the lengths of a prompt, mean", "two samples per prompt"),
    Metric("length/p50", "tokens", "median length"),
    Metric("length/p99", "tokens", "99th percentile of the lengths"),
    Metric("num_skipped", "", "evaluations that became due during this one"),
    Metric("pass_above", "reward", "a sample passes with a reward above this"),
    Metric("sets/{set}/reward/{which}", "reward", "`reward/` of one set of prompts", _SETS),
    Metric("sets/{set}/pass@{k}", "share", "pass@k of one set of prompts", _SETS),
    Metric("sets/{set}/length/{which}", "tokens", "`length/` of one set of prompts", _SETS),
)
"""Of lines whose `type` is `evaluation`. Outside `metrics.jsonl` their names begin with `evaluation/`."""


def metric_of(name: str, metrics: tuple[Metric, ...] = STEP_METRICS) -> Metric | None:
    """The entry of a name; None for a metric that a loss of the user's adds.

    >>> metric_of("tokens/trained").unit
    'tokens'
    """
    return next((metric for metric in metrics if metric.pattern.fullmatch(name)), None)


def metric_table() -> str:
    """The table of the README."""
    rows = ["| metric of a step | unit | meaning |", "|---|---|---|", *map(_row, STEP_METRICS)]
    rows += ["", "| metric of an evaluation | unit | meaning |", "|---|---|---|", *map(_row, EVALUATION_METRICS)]
    return "\n".join(rows) + "\n"


def _row(metric: Metric) -> str:
    name = re.sub(r"\{(\w+)\}", lambda found: found[1].upper(), metric.name)
    when = f" (only if {metric.only_if})" if metric.only_if else ""
    return f"| `{name}` | {metric.unit} | {metric.meaning}{when} |"
