"""The charts of the dashboard: which metrics are in which. A metric that no chart names gets one of its own."""

from typing import Final, Literal

from msgspec import Struct

from darts_async.topology.outcomes import OUTCOMES


class Series(Struct, frozen=True):
    """A line of a chart."""

    metric: str
    """As in `metrics.jsonl`."""
    label: str


class Chart(Struct, frozen=True):
    """One chart over the steps. It is shown if the run has one of its metrics."""

    title: str
    about: str
    series: tuple[Series, ...]
    kind: Literal["lines", "stacked"] = "lines"
    """`stacked`: areas one above the other, which are parts of a total."""
    band: tuple[str, str] | None = None
    """Two metrics between which an area is filled: the spread of the first line."""
    family: str = ""
    """A name with `*`: each metric of that form is a line too, labelled with what the star is."""
    evaluated: str = ""
    """The metric of evaluations that is drawn as points at the version that was evaluated."""


CHARTS: Final = (
    Chart(
        "Reward",
        "mean reward; points are held-out prompts",
        (Series("reward/pool_mean", "all scored"), Series("reward/mean", "trained on")),
        evaluated="reward/mean",
    ),
    Chart(
        "Response length",
        "tokens; the area is from the median to the 99th percentile of all scored samples",
        (Series("length/pool_mean", "all scored"), Series("length/mean", "trained on")),
        band=("length/pool_p50", "length/pool_p99"),
        evaluated="length/mean",
    ),
    Chart("Reward functions", "mean of each, of all scored samples", (), family="rewards/*/mean"),
    Chart("Loss", "of the step", (Series("learner/loss", "loss"), Series("learner/loss_policy", "policy part"))),
    Chart(
        "KL",
        "of the policy to the one that decoded, and to the reference model",
        (Series("learner/approx_kl", "behaviour policy"), Series("learner/reference_kl", "reference model")),
    ),
    Chart("Entropy", "nats per token", (Series("learner/entropy", "entropy"),)),
    Chart("Gradient norm", "before clipping", (Series("learner/grad_norm", "norm"),)),
    Chart(
        "Clip share",
        "share of the tokens",
        (
            Series("learner/clip_share_high", "clipped from above"),
            Series("learner/clip_share_low", "clipped from below"),
            Series("learner/truncated_share", "ratio truncated"),
        ),
    ),
    Chart("Learning rate", "of the step", (Series("learner/learning_rate", "rate"),)),
    Chart(
        "Zero-advantage groups",
        "share of the groups in which all rewards are the same",
        (Series("groups/pool_zero_advantage_share", "all scored"), Series("groups/zero_advantage_share", "trained on")),
    ),
    Chart(
        "Staleness",
        "policy versions between decoding a token and training on it",
        (Series("staleness/max", "oldest token"), Series("staleness/mean", "mean of samples")),
    ),
    Chart(
        "Importance ratio",
        "of a token; the area is from the 1st to the 99th percentile",
        (Series("learner/ratio_mean", "mean"), Series("learner/ratio_max", "highest")),
        band=("learner/ratio_p01", "learner/ratio_p99"),
    ),
    Chart(
        "Tokens by outcome",
        "tokens since the start, by what became of their samples",
        tuple(Series(f"tokens/{outcome}", outcome) for outcome in OUTCOMES),
        kind="stacked",
    ),
    Chart("Idle share", "share of the time of a step", (Series("learner/idle_share", "waits for samples"),)),
    Chart("Speed", "tokens per second that are trained on", (Series("learner/tokens_per_second", "tokens/s"),)),
    Chart(
        "Weight updates",
        "seconds from a step to its weights in every generator",
        (
            Series("weights/total_s", "in all"),
            Series("weights/transfer_s", "transfer"),
            Series("weights/stall_s", "decoding paused"),
        ),
    ),
)
