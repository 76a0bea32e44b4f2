"""Warnings about a run that continues and learns little: each is told once, with what to do. Pure.

A warning looks at the means of the latest `WINDOW_STEPS` steps, so that one odd step does not raise it. A step that
comes again after a restart of the learner is not counted twice.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from launcher.progress.step_merger import StepLine

WINDOW_STEPS = 5
MUCH_CUT = 0.5
"""Share of responses that reach `sampling.max_new_tokens`."""
MUCH_WITHOUT_SIGNAL = 0.8
"""Share of groups whose samples all have the same reward."""
MUCH_FAILED = 0.1
"""Share of responses without a reward."""

_REWARD, _EQUAL = "reward/pool_mean", "groups/pool_zero_advantage_share"
_CUT, _FAILED = "length/capped_share", "reward/failed_share"
WATCHED = _REWARD, _EQUAL, _CUT, _FAILED
"""The metrics that warnings follow from."""

Window = Mapping[str, list[float]]
"""The latest values of each metric, the newest last."""


def _constant(window: Window) -> str | None:
    rewards, equal = window[_REWARD], window[_EQUAL]
    if min(equal) < 1.0 or min(rewards) != max(rewards):
        return None
    return (
        f"every reward of the last {WINDOW_STEPS} steps is {rewards[0]:g}, so nothing is learned; read some responses "
        "with `darts-launch samples`, and look at how the reward reads them"
    )


def _without_signal(window: Window) -> str | None:
    share = _mean(window[_EQUAL])
    if share < MUCH_WITHOUT_SIGNAL:
        return None
    return (
        f"all samples have the same reward in {share:.0%} of the groups, and these groups teach nothing; take prompts "
        "that this model neither always nor never solves, or generate more samples for each (shaping.keep)"
    )


def _cut(window: Window) -> str | None:
    share = _mean(window[_CUT])
    if share < MUCH_CUT:
        return None
    return (
        f"{share:.0%} of the responses are cut at sampling.max_new_tokens; raise it, or look with "
        "`darts-launch samples` whether the model ends its responses at all"
    )


def _failed(window: Window) -> str | None:
    share = _mean(window[_FAILED])
    if share < MUCH_FAILED:
        return None
    return (
        f"{share:.0%} of the responses have no reward, because the function fails, and are not trained on; "
        "`darts-launch samples --failed` shows them, and `darts-launch logs reward` has the messages"
    )


_CHECKS: tuple[tuple[tuple[str, ...], Callable[[Window], str | None]], ...] = (
    ((_REWARD, _EQUAL), _constant),
    ((_EQUAL,), _without_signal),
    ((_CUT,), _cut),
    ((_FAILED,), _failed),
)


@dataclass(slots=True)
class TrainingWarnings:
    """Takes the lines of steps, and gives each warning once.

    Example:
        >>> warnings = TrainingWarnings()
        >>> for step in range(5):
        ...     told = warnings.take(StepLine(step, {"length/capped_share": 0.75}))
        >>> told[0][:58]
        '75% of the responses are cut at sampling.max_new_tokens; r'
        >>> warnings.take(StepLine(5, {"length/capped_share": 0.75}))
        []
    """

    _values: dict[str, deque[float]]
    _told: set[int]
    _num_steps: int

    def __init__(self) -> None:
        self._values = {metric: deque(maxlen=WINDOW_STEPS) for metric in WATCHED}
        self._told, self._num_steps = set(), 0

    def take(self, line: StepLine) -> list[str]:
        """The metrics of a step; returns the warnings that are new."""
        if line.step < self._num_steps:
            return []
        self._num_steps = line.step + 1
        for metric, values in self._values.items():
            if metric in line.metrics:
                values.append(line.metrics[metric])
        return list(self._new())

    def validate(self) -> None:
        """Raises `AssertionError` if the state is not sound."""
        assert all(len(values) <= WINDOW_STEPS for values in self._values.values())
        assert self._told <= set(range(len(_CHECKS)))

    def _new(self) -> Iterator[str]:
        window = {metric: list(values) for metric, values in self._values.items()}
        for number, (metrics, check) in enumerate(_CHECKS):
            if number in self._told or any(len(window[metric]) < WINDOW_STEPS for metric in metrics):
                continue
            text = check(window)
            if text is not None:
                self._told.add(number)
                if check is _constant:  # of which the second says less
                    self._told.add(number + 1)
                yield text


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
