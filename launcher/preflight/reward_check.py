"""Whether rewards can be given on this machine: the sandbox for programs in responses."""

from collections.abc import Iterator

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.reward.sandbox.isolation import find_isolation
from launcher.problems import Problem, shown


def check_rewards(config: RunConfig) -> Iterator[Problem]:
    """The isolation that is wanted is there; a weak one is a hint."""
    for number, part in enumerate(config.reward.functions):
        place = f"reward.functions.{number}.code.isolation"
        if part.code is None:
            continue
        try:
            found = find_isolation(part.code.isolation)
        except ConfigError as error:
            yield Problem(place, str(error), shown(part.code.isolation), here=True)
            continue
        if not found.is_closed:
            message = f"programs in responses run as {found.describe()}: they may read your files or reach the network"
            fix = "install the package `bubblewrap` on the nodes of the reward processes"
            yield Problem(place, message, shown(part.code.isolation), fix, is_hint=True)
