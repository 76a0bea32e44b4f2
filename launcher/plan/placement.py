"""Places processes on nodes and devices: pure and deterministic.

Roles with the least choice are placed first: those with fewer possible nodes, then those with more devices per process
(so that tensor-parallel groups get neighbours), then in the order of `ROLES`. Within a role the order is by number. A
process with devices goes to the node where it must share the fewest, and among these to the first in the file. There it
gets the lowest numbers, unused ones first. A role never shares a device with itself. Processes without devices are
assigned round-robin to the nodes of their role, in the order of the file.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from darts_async.config import NodeConfig, RoleConfig, RunConfig
from darts_async.errors import ConfigError
from darts_async.topology.roles import ROLES, Role
from launcher.problems import Problem, shown

Takers = defaultdict[tuple[str, int], set[Role]]
"""The roles that use a device, by name of the node and number."""


@dataclass(frozen=True, slots=True)
class Place:
    node: str
    host: str
    devices: tuple[int, ...] = ()


class PlacementError(ConfigError):
    """The nodes of a role have too few devices."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(f"{problem.place}: {problem.message}")


def role_config(config: RunConfig, role: Role) -> RoleConfig:
    return config.roles.of(role)


def role_names(config: RunConfig, role: Role) -> tuple[str, ...]:
    return role.processes(role_config(config, role).replicas)


def place_processes(config: RunConfig) -> dict[str, Place]:
    """The place of every process, by name. Raises `PlacementError`."""
    takers: Takers = defaultdict(set)
    places: dict[str, Place] = {}
    for role in sorted(ROLES, key=lambda role: (len(_nodes_of(config, role)), -role_config(config, role).devices)):
        for number, name in enumerate(role_names(config, role)):
            places[name] = _place(config, role, number, takers)
    return places


def local_node(config: RunConfig) -> NodeConfig:
    """The node on which `darts-launch` is called."""
    return config.nodes[0]


def _nodes_of(config: RunConfig, role: Role) -> list[NodeConfig]:
    """The nodes that a role may run on, in the order of the file."""
    names = role_config(config, role).nodes
    return [node for node in config.nodes if not names or node.name in names]


def _place(config: RunConfig, role: Role, number: int, takers: Takers) -> Place:
    nodes, wanted = _nodes_of(config, role), role_config(config, role).devices
    if wanted == 0:
        node = nodes[number % len(nodes)]
        return Place(node.name, config.host_of(node))
    offers = [(node, list(_free_devices(config, role, node, takers))[:wanted]) for node in nodes]
    offers = [(node, devices) for node, devices in offers if len(devices) == wanted]
    if not offers:
        raise PlacementError(_no_room(config, role, number, takers))
    num_shared = [sum(bool(takers[node.name, device]) for device in devices) for node, devices in offers]
    node, devices = offers[num_shared.index(min(num_shared))]  # the first of equals
    for device in devices:
        takers[node.name, device].add(role)
    return Place(node.name, config.host_of(node), tuple(sorted(devices)))


def _free_devices(config: RunConfig, role: Role, node: NodeConfig, takers: Takers) -> Iterator[int]:
    """The devices that a process of the role may use there: unused ones first, then shared ones."""
    devices = sorted(node.devices)
    yield from (device for device in devices if not takers[node.name, device])
    if role_config(config, role).share_devices:
        for device in devices:
            others = takers[node.name, device]
            if others and role not in others and all(role_config(config, other).share_devices for other in others):
                yield device


def _no_room(config: RunConfig, role: Role, number: int, takers: Takers) -> Problem:
    settings, nodes = role_config(config, role), _nodes_of(config, role)
    room = ", ".join(
        f"{node.name} has {sum(1 for _ in _free_devices(config, role, node, takers))} of {len(node.devices)} free"
        for node in nodes
    )
    message = f"no node can take {role.process(number)} of {settings.replicas}: it needs {settings.devices} of one node"
    fix = (
        f"lower roles.{role}.devices or replicas, raise devices of a node, or set share_devices for {role} and the "
        "role with which it shares them"
    )
    return Problem(f"roles.{role}.devices", f"{message}, but {room}", shown(settings.devices), fix)
