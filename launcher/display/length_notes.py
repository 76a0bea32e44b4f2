"""How much a shaping rule rewards or penalises length, in words, for the plan of a run.

The numbers are `selection/pays_for_length` (see `darts_async.shaper.rules.length_pay`) on the log that the authors of
DARTS have released: 16 complete samples of each of 2,560 mathematical prompts, by one model. In that log, responses
that are longer by the prompt's mean length are right .08 less often. The numbers show sign and size; a run reports its
own as a metric.
"""

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


def length_note(shaping: ShapingConfig, *, normalises: bool) -> str:
    """The sentence; `normalises`: advantages are divided by the deviation of their group."""
    rule = "none" if shaping.launch == shaping.keep and shaping.redundancy.total == "off" else shaping.rule
    parts = [_SENTENCES[rule] if rule != "survivor" else _survivor(shaping, normalises)]
    if measured := _measured(rule, shaping.weight_power):
        parts.append(f"on the released log of the DARTS paper {measured}")
    if shaping.early_stop and rule in ("shortest", "dual_end"):
        parts.append("with early stop it acts like rule shortest, and the metric cannot show this")
    if shaping.pruning.mode == "saturation":
        parts.append("prompts with saturated redundancy act like rule shortest, and the metric cannot show this")
    return "; ".join(parts)


_SENTENCES = {
    "none": "length is not rewarded: every sample is trained on",
    "random": "length is not rewarded: samples are selected at random",
    "shortest": "length is rewarded: long samples are not trained on, so wrong ones among them are not penalised",
    "longest": "length is penalised a little: the shortest samples, which are right more often, are not trained on",
    "dual_end": "length is penalised where the longest samples are wrong, and more so with a larger shaping.launch",
    "qlpo": "length is strongly penalised, by design: short right samples and long wrong samples are selected",
}


def _survivor(shaping: ShapingConfig, normalises: bool) -> str:
    power = shaping.weight_power
    if power < 1:
        return (
            f"with shaping.weight_power {power:g} length is rewarded where long answers are more often wrong, and "
            "penalised where they are more often right: most selected samples are short, and survivors count for too "
            "little"
        )
    if normalises and shaping.baseline != "history":
        return (
            "length is not rewarded, up to noise; but learner.loss.normalise_advantage divides by the group's own "
            "deviation, which makes weight_power 1 biased"
        )
    return "length is not rewarded, up to noise"


def _measured(rule: str, power: float) -> str:
    found = [
        f"{paid:+.3f} of {launch}{f' with {ends}' if ends else ''}"
        for (name, ends, launch, gamma), paid in PAID_ON_THE_TRACE.items()
        if name == rule and gamma == power
    ]
    return f"{', '.join(found)} (right answers per mean length; length itself is worth -.080)" if found else ""
