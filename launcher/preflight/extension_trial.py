"""A program that loads what a run brings itself, as the process will that calls it, and tries it out.

It is a process of its own because an import runs what the user has written. That may print, leave Python, hang, change
what signals do or start something, and none of this is to happen to the launcher. It reads a `Question` and answers
with what was `Found`, both as JSON.
"""

import os
import sys

import msgspec

from darts_async.config import RunConfig
from darts_async.errors import DartsError
from darts_async.extensions import KINDS, LOSS, PROMPTS, REWARDS, RULE, SINK, Kind, load
from launcher.preflight.prompt_check import Found, look_at_prompts
from launcher.problems import Problem, shown


class Question(msgspec.Struct, frozen=True):
    setting: str
    name: str
    """`module:name`."""
    config: str
    """`RunConfig` as JSON."""


def main() -> None:
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    config, kind = RunConfig.model_validate_json(question.config), KINDS[question.setting]
    with os.fdopen(os.dup(1), "wb") as answer:
        _silence()
        answer.write(msgspec.json.encode(_try(kind, question.name, config)))


def _silence() -> None:
    """What the module prints is for the log of the process that calls it."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)


def _try(kind: Kind, name: str, config: RunConfig) -> Found:
    try:
        if kind is PROMPTS:
            return look_at_prompts(config)
        if kind is RULE:
            from darts_async.shaper.rules.custom import try_rule

            try_rule(config)
        elif kind is LOSS:
            from darts_async.learner.losses.kinds import try_loss  # needs torch, which the others do not

            try_loss(config.learner.loss)
        elif kind is REWARDS["sample"]:
            for takes in {part.takes for part in config.reward.functions if part.function == name}:
                load(REWARDS[takes], name)
        elif kind is SINK:
            getattr(load(kind, name), "check", _accept)(config)
        else:
            load(kind, name)
    except DartsError as error:
        return Found((Problem(kind.setting, str(error), shown(name)),))
    return Found()


def _accept(config: RunConfig) -> None:
    """Of a sink without a check."""


if __name__ == "__main__":
    main()
