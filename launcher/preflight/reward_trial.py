"""A program that loads a reward function as a reward worker will.

It is a process of its own because an import runs what the user has written. That may print, leave Python, hang, change
what signals do or start something, and none of this is to happen to the launcher. Its one argument is the name of the
function; its output is a line of JSON: what is wrong, or null.
"""

import argparse
import json
import os

from darts_async.errors import RewardError
from darts_async.reward.loading import load_function


def main() -> None:
    """Load one function and say how that went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("function", help="`module:function`")
    name = parser.parse_args().function
    with os.fdopen(os.dup(1), "w") as answer:
        _silence()
        answer.write(json.dumps(_fault(name)))


def _silence() -> None:
    """What the module prints is for the log of the reward process."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)


def _fault(name: str) -> str | None:
    try:
        load_function(name)
    except RewardError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
