"""Whether this machine can confine the programs in responses, and how."""

from collections.abc import Iterator

from darts_async.config import RewardConfig, RunConfig
from darts_async.errors import ConfigError
from darts_async.reward.code import isolation_of
from darts_async.reward.worker_messages import CodeSpec
from launcher.problems import Problem, shown


def check_rewards(config: RunConfig) -> Iterator[Problem]:
    """Programs can be confined; gaps that the settings allow are a hint."""
    for number, part in enumerate(config.reward.functions):
        if part.code is None:
            continue
        place, value = f"reward.functions.{number}.code.isolation", shown(part.code.isolation)
        try:
            found = isolation_of(CodeSpec(**part.code.model_dump()))
        except ConfigError as error:
            yield Problem(place, str(error), value, here=True)
            continue
        if found.gaps:
            fix = "install the package `bubblewrap` on the nodes of the reward processes"
            yield Problem(place, f"programs in responses run in {found.describe()}", value, fix, is_hint=True)


def isolations(reward: RewardConfig) -> Iterator[str]:
    """How this machine confines programs, for people."""
    for part in reward.functions:
        if part.code is not None:
            try:
                yield isolation_of(CodeSpec(**part.code.model_dump())).describe()
            except ConfigError:
                yield "no sandbox of this machine"
