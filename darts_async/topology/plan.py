"""The resolved plan of a run, written once and read by every process.

A process finds in it, by its own name, the links that it binds and those that it connects to.
"""

from pathlib import Path

import msgspec

from darts_async.errors import ConfigError
from darts_async.topology.roles import LAUNCHER, agent_name
from darts_async.topology.run_files import PLAN_FILE


class LinkPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One link: `hub` binds `address`, and each of `members` connects to it."""

    name: str
    hub: str
    address: str
    members: tuple[str, ...]


class ProcessSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How and where one process is started. `env` is added to the environment of the launcher."""

    name: str
    role: str
    argv: tuple[str, ...]
    env: dict[str, str]
    start_timeout_s: float
    node: str = "local"
    host: str = "127.0.0.1"
    """Address of its node, at which all its sockets listen."""
    devices: tuple[int, ...] = ()
    """Numbers of the GPUs of its node that it may use, as `cuda:0` onwards."""


class RunPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All processes and all links of a run."""

    processes: tuple[ProcessSpec, ...]
    links: tuple[LinkPlan, ...]
    life: int = 1
    """Number of the life of the run: in another one all processes are new."""
    from_checkpoint: bool = False
    """The run continues from its newest checkpoint, and not from the journal of the shaper."""

    def link(self, name: str) -> LinkPlan:
        """The link of that name."""
        return next(link for link in self.links if link.name == name)

    def process(self, name: str) -> ProcessSpec:
        """The process of that name."""
        return next(spec for spec in self.processes if spec.name == name)

    def names(self, role: str) -> tuple[str, ...]:
        """The processes of a role, in order."""
        return tuple(spec.name for spec in self.processes if spec.role == role)

    def endpoints(self) -> tuple[str, ...]:
        """Every name that needs a key: the launcher, its agents, and all processes."""
        return (LAUNCHER, *map(agent_name, self.nodes), *(spec.name for spec in self.processes))

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that have processes, in the order of these."""
        return tuple(dict.fromkeys(spec.node for spec in self.processes))


def encode_plan(plan: RunPlan) -> bytes:
    """The plan as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n"


def decode_plan(data: bytes) -> RunPlan:
    """The inverse of `encode_plan`. Raises `ConfigError`."""
    try:
        return msgspec.json.decode(data, type=RunPlan)
    except msgspec.DecodeError as error:
        raise ConfigError(f"not a plan of this version: {error}") from error


def read_plan(run_dir: Path) -> RunPlan:
    """The plan in a run directory. Raises `ConfigError`."""
    path = run_dir / PLAN_FILE
    try:
        return decode_plan(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{run_dir} is not a run directory: no {PLAN_FILE} ({error.strerror})") from error
