"""What the rule of a run pays for length, in words, for whoever plans one.

The numbers are `selection/pays_for_length` (see `darts_async.shaper.rules.length_pay`) on the log that the authors of
DARTS have released: 16 complete samples of each of 2,560 mathematical prompts, by one model. There a response longer by
its prompt's mean length is right .08 less often. They tell sign and size; the metric of a run tells its own.
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
"""Right answers per mean length, by rule, `shortest` + `longest`, samples launched of which 8 are kept, and gamma."""


def length_note(shaping: ShapingConfig, *, normalises: bool) -> str:
    """The sentence; `normalises`: advantages are divided by the deviation of their group."""
    rule = "none" if shaping.launch == shaping.keep and shaping.redundancy.total == "off" else shaping.rule
    parts = [_SENTENCES[rule] if rule != "survivor" else _survivor(shaping, normalises)]
    if measured := _measured(rule, shaping.weight_power):
        parts.append(f"on the released log of the DARTS paper {measured}")
    if shaping.early_stop and rule in ("shortest", "dual_end"):
        parts.append("early stop cuts the long ones unseen: then as shortest, and no metric of a run can tell")
    if shaping.pruning.mode == "saturation":
        parts.append("prompts whose redundancy is saturated: as shortest, and no metric of a run can tell")
    return "; ".join(parts)


_SENTENCES = {
    "none": "nothing is paid for length: every sample is trained",
    "random": "nothing is paid for length: the choice is made at random",
    "shortest": "it pays for length: long samples are not trained, so that they fail goes unpunished",
    "longest": "it costs a little: the short end, which is right more often than the longest, is not trained",
    "dual_end": "it costs where the longest are wrong, the more the more are launched",
    "qlpo": "it costs much, and that is meant: right ones are kept short and wrong ones long",
}


def _survivor(shaping: ShapingConfig, normalises: bool) -> str:
    power = shaping.weight_power
    if power < 1:
        return (
            f"with shaping.weight_power {power:g} it pays for length where long answers are more often wrong, and "
            "costs where they are more often right: a survivor counts for less than it stands for, and most of what is "
            "kept is short"
        )
    if normalises and shaping.baseline != "history":
        return (
            "nothing is paid for length up to noise; but learner.loss.normalise_advantage divides by the group's own "
            "deviation, with which weight_power 1 is not unbiased"
        )
    return "nothing is paid for length up to noise"


def _measured(rule: str, power: float) -> str:
    found = [
        f"{paid:+.3f} of {launch}{f' with {ends}' if ends else ''}"
        for (name, ends, launch, gamma), paid in PAID_ON_THE_TRACE.items()
        if name == rule and gamma == power
    ]
    return f"{', '.join(found)} (right answers per mean length, where length itself is worth -.080)" if found else ""
