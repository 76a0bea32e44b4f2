"""How much a shaping rule rewards or penalises length, in sentences, for the plan of a run.

The numbers are `selection/pays_for_length` (see `darts_async.shaper.rules.length_pay`) on the log that the authors of
DARTS have released: 16 complete samples of each of 2,560 mathematical prompts, by one model. In that log, responses
that are longer by the prompt's mean length are right .08 less often. The numbers show sign and size; a run reports its
own as a metric.
"""

from collections.abc import Iterator

from darts_async.config import ShapingConfig

PAID_ON_THE_TRACE: dict[tuple[str, str, int, float], float] = {
    ("survivor", "6+2", 12, 0.0): 0.035,
    ("survivor", "7+1", 10, 0.0): 0.036,
    ("survivor", "6+2", 12, 1.0): 0.0,
    ("dual_end", "7+1", 10, 0.0): -0.003,
    ("dual_end", "7+1", 12, 0.0): -0.007,
    ("dual_end", "7+1", 16, 0.0): -0.029,
    ("dual_end", "6+2", 12, 0.0): -0.036,
    ("shortest", "", 10, 0.0): 0.071,
    ("shortest", "", 12, 0.0): 0.083,
    ("longest", "", 12, 0.0): -0.015,
    ("qlpo", "", 10, 0.0): -0.136,
    ("qlpo", "", 12, 0.0): -0.244,
}
"""Right answers per mean length, by rule, `shortest` + `longest`, samples generated (8 are selected), and gamma."""


_SENTENCES = {
    "none": ("Length is not rewarded", "Every sample is trained on"),
    "random": ("Length is not rewarded", "Samples are selected at random"),
    "shortest": ("Length is rewarded", "Long samples are not trained on, so wrong ones among them are not penalised"),
    "longest": (
        "Length is penalised a little",
        "The shortest samples are right more often, and they are not trained on",
    ),
    "dual_end": (
        "Length is penalised where the longest samples are wrong",
        "A larger shaping.launch penalises it more",
    ),
    "qlpo": ("Length is strongly penalised, by design", "Short right samples and long wrong samples are selected"),
}


def length_note(shaping: ShapingConfig, *, normalises: bool) -> str:
    """The sentences; `normalises`: advantages are divided by the deviation of their group."""
    rule = "none" if shaping.launch == shaping.keep and shaping.redundancy.total == "off" else shaping.rule
    sentences = [*(_SENTENCES[rule] if rule != "survivor" else _survivor(shaping, normalises))]
    sentences += _measured(rule, shaping.weight_power)
    if shaping.early_stop and rule in ("shortest", "dual_end"):
        sentences.append("With early stop it acts like rule shortest, and the metric cannot show this")
    if shaping.pruning.mode == "saturation":
        sentences.append("Prompts with saturated redundancy act like rule shortest, and the metric cannot show this")
    return " ".join(f"{sentence}." for sentence in sentences)


def _survivor(shaping: ShapingConfig, normalises: bool) -> Iterator[str]:
    if shaping.weight_power < 1:
        yield "Length is rewarded where long answers are more often wrong"
        yield "It is penalised where they are more often right"
        yield "Most selected samples are short"
        yield f"With shaping.weight_power {shaping.weight_power:g}, survivors count for too little to make up for that"
        return
    yield "Length is not rewarded, up to noise"
    if normalises and shaping.baseline != "history":
        yield "But learner.loss.normalise_advantage divides by the group's own deviation"
        yield "This makes shaping.weight_power 1 biased"


def _measured(rule: str, power: float) -> Iterator[str]:
    found = [
        f"{paid:+.3f} with {launch} samples{f' and ends {ends}' if ends else ''}"
        for (name, ends, launch, gamma), paid in PAID_ON_THE_TRACE.items()
        if name == rule and gamma == power
    ]
    if found:
        yield "In the released log of the DARTS paper, length by itself is worth -0.080 right answers per mean length"
        yield f"There this rule pays {', '.join(found)}"
