"""Validates messages to the launcher: an invalid message is refused, and its sender is killed.

Each process has its own key, so the sender of a message is certain, but its content may be wrong. The launcher believes
each process about itself and the shaper about the run. It believes an accusation of another process only if the accuser
may make it (`may_accuse`) or others agree (`Accusations`). Otherwise a faulty process could restart all others.
"""

import math
from collections.abc import Iterable

import numpy as np

from darts_async.accusations import Accusations
from darts_async.protocol import (
    EvaluationCompleted,
    PeerRefused,
    ProcessStatus,
    ProcessToLauncher,
    RunFinished,
    ScoreFailed,
    StepCompleted,
    TakeUpAgain,
)
from darts_async.topology.plan import RunPlan
from darts_async.topology.roles import LAUNCHER, may_accuse_each_other, role_of

MAX_NAME_CHARACTERS = 200
"""Longest name of a metric, a stage or a state."""
MAX_NAMES = 10_000
"""Metrics of a step, or stages of a process."""


class Boundary:
    """Checks messages against the plan of a run of `num_steps` optimiser steps."""

    def __init__(self, plan: RunPlan, num_steps: int) -> None:
        self._plan = plan
        self._num_steps = num_steps
        self._accusations = Accusations({link.name: (link.hub, link.members) for link in plan.links})

    def refusal(self, name: str, message: ProcessToLauncher) -> str | None:
        """Why a message of this process is invalid; None if it is valid."""
        role = role_of(name)
        if not isinstance(message, (ProcessStatus, PeerRefused, *role.tells_launcher)):
            return f"a {type(message).__name__}, which a {role} does not send"
        match message:
            case ProcessStatus():
                return self._status(message)
            case StepCompleted():
                return self._step(message)
            case EvaluationCompleted():
                return self._evaluation(message)
            case ScoreFailed():
                return _names([message.kind])
            case RunFinished():
                return self._finished(message)
            case TakeUpAgain():
                return None
            case PeerRefused():
                return self._accusation(name, message)

    def may_accuse(self, accuser: str, accused: str) -> bool:
        """Whether the word of one is enough to restart the other. A hub may accuse the members of its links. Shaper and
        learner, which every run needs, may accuse each other."""
        return may_accuse_each_other(accuser, accused) or self._talk(accuser, accused)

    def culprits(self, accuser: str, accused: str, incarnation: int) -> tuple[str, ...]:
        """The processes to restart after one has refused the present incarnation of another."""
        if self.may_accuse(accuser, accused):
            return (accused,)
        return self._accusations.hear(accuser, accused, incarnation)

    def _talk(self, hub: str, member: str) -> bool:
        return any(link.hub == hub and member in link.members for link in self._plan.links)

    def _status(self, message: ProcessStatus) -> str | None:
        numbers = [message.uptime_s, message.loop_lag_s, *message.busy_s.values()]
        if message.policy_version < -1 or message.policy_version > self._num_steps:
            return f"it is at version {message.policy_version} of {self._num_steps}"
        if not (_are_counts([message.num_tokens, message.num_in_flight]) and all(0 <= x < math.inf for x in numbers)):
            return f"{message.num_tokens} tokens, {message.num_in_flight} in flight, times {numbers[:3]}"
        return _names([message.state, *message.busy_s])

    def _step(self, message: StepCompleted) -> str | None:
        if not 0 <= message.step < self._num_steps:
            return f"step {message.step} of {self._num_steps}"
        return _names(message.metrics)

    def _evaluation(self, message: EvaluationCompleted) -> str | None:
        oldest, newest = message.policy_version, message.newest_version
        if not 0 <= oldest <= newest <= self._num_steps or message.num_skipped < 0:
            return f"an evaluation of versions {oldest} to {newest} of {self._num_steps}, {message.num_skipped} skipped"
        prompts, rewards, lengths = len(message.prompt_ids), len(message.rewards), len(message.num_tokens)
        if not prompts == rewards == lengths > 0:
            return f"an evaluation of {prompts} prompts, {rewards} rewards and {lengths} lengths"
        if not np.isfinite(message.rewards).all() or message.num_tokens.min() < 0:
            return f"rewards {message.rewards[:5]} of {message.num_tokens[:5]} tokens"
        if not math.isfinite(message.pass_above):
            return f"samples that pass above {message.pass_above}"
        return _names([*message.part_metrics, *message.prompts_by_set])

    def _finished(self, message: RunFinished) -> str | None:
        counts = [*message.tokens_by_outcome.values(), *message.samples_by_outcome.values(), message.num_steps]
        counts += [*message.tokens_by_staleness.values(), *message.failed_rewards.values(), message.num_rewards]
        counts += [count for tokens in message.tokens_by_generator.values() for count in tokens.values()]
        if not _are_counts(counts) or message.num_steps > self._num_steps:
            return f"counts below zero, or {message.num_steps} steps of {self._num_steps}"
        kinds = [*message.failed_rewards, *message.first_failures]
        return _names([*message.tokens_by_outcome, *message.samples_by_outcome, *message.tokens_by_generator, *kinds])

    def _accusation(self, name: str, message: PeerRefused) -> str | None:
        talk = any(self._talk(one, other) for one, other in ((name, message.name), (message.name, name)))
        if not talk or message.name == LAUNCHER:
            return f"it accuses {message.name[:MAX_NAME_CHARACTERS]!r}, which has no link to it"
        return None


def _are_counts(numbers: Iterable[int]) -> bool:
    return all(0 <= number < 1 << 63 for number in numbers)


def _names(names: Iterable[str]) -> str | None:
    """Check that names are few, short and on one line, because they are shown and written."""
    for number, name in enumerate(names):
        if number >= MAX_NAMES:
            return f"more than {MAX_NAMES} names"
        if len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
            return f"the name {name[:MAX_NAME_CHARACTERS]!r}"
    return None
