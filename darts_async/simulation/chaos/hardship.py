"""Faults in addition to those of a plan: of the disk, of the launcher, and of processes that send invalid messages.

They are drawn from a stream of their own, so that what else a seed draws does not depend on them.
"""

from dataclasses import dataclass
from random import Random
from typing import Literal

LastMoment = Literal["", "last step taken", "model written", "end told"]
Loss = Literal["nothing", "unflushed", "anything"]


@dataclass(frozen=True, slots=True)
class DiskFull:
    """No file grows for a while."""

    at_s: float
    lasts_s: float


@dataclass(frozen=True, slots=True)
class Hardship:
    """See the module. Times are seconds of the virtual clock."""

    outages_at_s: tuple[float, ...]
    """More outages than the blows of the plan."""
    starts_slowly: bool
    """A process begins a while after it was started, as one does that imports."""
    outage_while_starting: float
    """Probability that the launcher and all it has started die again within half a second of a start."""
    last_moment: LastMoment
    """What everything dies after, once, in the last second of the run."""
    dies_after_s: float
    """So long after it."""
    loss: Loss
    """What an outage may take of journal and ledger: nothing, what was not flushed, or anything at all."""
    lies: float
    """Probability of nonsense before a message."""
    full_disks: tuple[DiskFull, ...]


def draw_hardship(seed: int, calm_after_s: float) -> Hardship:
    """Of the run of a seed."""
    rng = Random(f"hardship of {seed}")
    return Hardship(
        outages_at_s=tuple(rng.uniform(0.0, calm_after_s) for _ in range(rng.choice((0, 0, 1, 2, 4)))),
        starts_slowly=rng.random() < 0.5,
        outage_while_starting=rng.choice((0.0, 0.0, 0.3, 0.6)),
        last_moment=rng.choice(("", "", "", "last step taken", "model written", "end told")),
        dies_after_s=rng.choice((0.0, rng.uniform(0.0, 0.01), rng.uniform(0.0, 0.2))),
        loss=rng.choice(("nothing", "unflushed", "anything", "anything")),
        lies=rng.choice((0.0, 0.0, 0.0005, 0.005)),
        full_disks=tuple(
            DiskFull(rng.uniform(0.0, calm_after_s), rng.uniform(0.05, 2.0)) for _ in range(rng.choice((0, 0, 0, 1, 2)))
        ),
    )
