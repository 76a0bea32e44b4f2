"""The table of the roles of processes. A role is one entry here, and a link of its own one entry in `links`. Settings
(`roles.NAME`), plan, addresses, keys and restarts follow from these."""

from dataclasses import dataclass
from typing import Any, Final

from darts_async.protocol import EvaluationCompleted, RunFinished, ScoreFailed, StepCompleted, TakeUpAgain

READS_MODEL, READS_PROMPTS = "model", "prompts"


@dataclass(frozen=True, slots=True, eq=False)
class Role:
    """A kind of processes. They are named `NAME/NUMBER`, numbered from 0.

    >>> Role("umpire", module="my_package.umpire").process(2)
    'umpire/2'
    """

    name: str
    """Also of its section in the settings, `roles.NAME`."""
    module: str = ""
    """What a process runs: `python -m MODULE --run-dir DIR --name NAME/NUMBER --incarnation N`."""
    is_single: bool = False
    """There is exactly one."""
    has_ranks: bool = False
    """The processes are ranks: each is told its rank and drives one device, and they end and restart together."""
    is_essential: bool = False
    """Every run needs it. Two essential roles may accuse each other."""
    decodes: bool = False
    """It hangs if it has samples in flight and decodes no token."""
    num_model_copies: int = 0
    """Address space that it needs, in bytes of the weights' file: for gradients, moments and a snapshot, or for
    staging. 0: it has no model."""
    reads: tuple[str, ...] = ()
    """The sections of the settings whose files or modules it reads on its node."""
    tells_launcher: tuple[type[Any], ...] = ()
    """The messages that it may send to the launcher, beside `ProcessStatus` and `PeerRefused`."""
    reports_per_step: int = 0
    """Messages `StepCompleted` of its first process for each optimiser step."""

    def __str__(self) -> str:
        return self.name

    def process(self, number: int) -> str:
        """The name of one of its processes."""
        return f"{self.name}/{number}"

    def processes(self, count: int) -> tuple[str, ...]:
        """The names of its first processes."""
        return tuple(map(self.process, range(count)))

    @property
    def first(self) -> str:
        """The name of its first process."""
        return self.process(0)


ROLES: Final[tuple[Role, ...]] = (
    SHAPER := Role(
        "shaper",
        module="darts_async.shaper.process",
        is_single=True,
        is_essential=True,
        reads=(READS_MODEL, READS_PROMPTS),
        tells_launcher=(StepCompleted, EvaluationCompleted, ScoreFailed, RunFinished, TakeUpAgain),
        reports_per_step=1,
    ),
    LEARNER := Role(
        "learner",
        module="darts_async.learner.process",
        has_ranks=True,
        is_essential=True,
        num_model_copies=10,
        reads=(READS_MODEL, READS_PROMPTS),
        tells_launcher=(StepCompleted,),
        reports_per_step=2,  # when the step is taken, and when the version is published
    ),
    REWARD := Role("reward", module="darts_async.reward.process"),
    GENERATOR := Role(
        "generator", module="darts_async.generator.process", decodes=True, num_model_copies=4, reads=(READS_MODEL,)
    ),
)
"""In the order of starting: hubs first, so that members find them listening."""

LAUNCHER: Final = "launcher"
AGENT: Final = Role("agent")
"""Works for the launcher on a node, after which it is named."""
KEEPER: Final = Role("keeper")
"""Starts a node's agent and processes, and outlives the agent. It has no link: the agent speaks for it."""

_BY_NAME: Final = {role.name: role for role in (*ROLES, Role(LAUNCHER), AGENT, KEEPER)}


def role_of(process: str) -> Role:
    """The role of a process by its name. Raises `ValueError` for a name that no process of a run has.

    >>> role_of("generator/3").name
    'generator'
    """
    role = _BY_NAME.get(process.partition("/")[0])
    if role is None:
        raise ValueError(f"{process!r} is the name of no process: they begin with {', '.join(_BY_NAME)}")
    return role


def agent_name(node: str) -> str:
    """What the agent of a node is called."""
    return f"{AGENT.name}/{node}"


def keeper_name(node: str) -> str:
    """What the keeper of a node is called."""
    return f"{KEEPER.name}/{node}"


def may_accuse_each_other(one: str, other: str) -> bool:
    """Whether each of two processes may have the other restarted."""
    role, another = role_of(one), role_of(other)
    return role.is_essential and another.is_essential and role is not another
