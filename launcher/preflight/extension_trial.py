"""A program that loads what a run brings itself, as the process will that calls it, and tries it out.

It is a process of its own because an import runs what the user has written. That may print, leave Python, hang, change
what signals do or start something, and none of this is to happen to the launcher. Its arguments are the setting, the
name and the `RunConfig`; its output is a line of JSON: what is wrong or null, and the numbers of a source's prompts.
"""

import argparse
import json
import os
from dataclasses import astuple

from darts_async.config import RunConfig
from darts_async.errors import DartsError
from darts_async.extensions import KINDS, LOSS, PROMPTS, RULE, Kind, load
from darts_async.prompts.load import load_prompts


def main() -> None:
    """Try one name and say how that went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("setting", choices=KINDS)
    parser.add_argument("name", help="`module:name`")
    parser.add_argument("config", help="`RunConfig` as JSON")
    given = parser.parse_args()
    with os.fdopen(os.dup(1), "w") as answer:
        _silence()
        answer.write(json.dumps(_try(KINDS[given.setting], given.name, RunConfig.model_validate_json(given.config))))


def _silence() -> None:
    """What the module prints is for the log of the process that calls it."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)


def _try(kind: Kind, name: str, config: RunConfig) -> tuple[str | None, tuple[int, ...]]:
    try:
        if kind is PROMPTS:
            return None, astuple(load_prompts(config).counts)
        if kind is RULE:
            from darts_async.shaper.rules.custom import try_rule

            try_rule(config)
        elif kind is LOSS:
            from darts_async.learner.losses.kinds import try_loss  # needs torch, which the others do not

            try_loss(config.learner.loss)
        else:
            load(kind, name)
    except DartsError as error:
        return str(error), ()
    return None, ()


if __name__ == "__main__":
    main()
