"""The machines of a run, and the devices that a role takes on them."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from darts_async.config.section import NonNegative, Section


def _counted(devices: Any) -> Any:
    """A count n stands for the devices 0 to n - 1."""
    if isinstance(devices, (list, tuple)):
        return devices
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 0:
        raise ValueError(f"devices is {devices!r}; write how many there are, or list their numbers")
    return tuple(range(devices))


class NodeConfig(Section):
    """A machine. The first of the list is the one on which `darts-launch` is called."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """What roles call it."""
    host: str | None = None
    """Address of its interface, in numbers: its processes listen there and are reached there. Without it, that of
    `network.host`; where there are several nodes, each has its own."""
    devices: Annotated[tuple[NonNegative, ...], BeforeValidator(_counted), Field(strict=False)] = ()
    """GPUs that the run may use: how many, or a list of their numbers as `nvidia-smi` shows them."""

    @field_validator("devices")
    @classmethod
    def _devices_are_distinct(cls, devices: tuple[int, ...]) -> tuple[int, ...]:
        twice = sorted({number for number in devices if devices.count(number) > 1})
        if twice:
            raise ValueError(f"device {twice[0]} is named twice in {list(devices)}; remove one of them")
        return devices


def _told_apart(nodes: tuple[NodeConfig, ...]) -> tuple[NodeConfig, ...]:
    """No two nodes have one name, nor one address: devices counted twice would be given out twice."""
    if not nodes:
        raise ValueError("the list of nodes is empty; name one, or leave the setting out")
    if len(nodes) == 1:
        return nodes
    names: dict[str, int] = {}
    hosts: dict[str, str] = {}
    for number, node in enumerate(nodes):
        if node.name in names:
            raise ValueError(f"nodes {names[node.name]} and {number} both have the name {node.name!r}; rename one")
        if node.host is None:
            raise ValueError(f"the node {node.name!r} has no host, but there are {len(nodes)} nodes; give its address")
        if node.host in hosts:
            raise ValueError(f"the nodes {hosts[node.host]!r} and {node.name!r} both have the host {node.host!r}")
        names[node.name], hosts[node.host] = number, node.name
    return nodes


Nodes = Annotated[tuple[NodeConfig, ...], Field(strict=False), AfterValidator(_told_apart)]
