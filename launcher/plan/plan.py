"""Plans the processes and links of a run from its settings. Pure, so a dry run shows exactly what a run would start.

Roles and links are those of the tables in `darts_async.topology`. Addresses are an argument: which ports are free is a
question for the machine, not for the plan.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from darts_async.config import RunConfig
from darts_async.extensions import ENGINE
from darts_async.machine.spawn import module_command
from darts_async.topology.links import LINKS, Link
from darts_async.topology.plan import LinkPlan, ProcessSpec, RunPlan
from darts_async.topology.roles import AGENT, ROLES, Role, agent_name
from launcher.plan.placement import Place, local_node, place_processes, role_config, role_names


def plan_run(config: RunConfig, run_dir: Path, addresses: Sequence[str]) -> RunPlan:
    """The processes and links of a run; `addresses[i]` is for link i of `link_hubs`. Raises `PlacementError`."""
    return RunPlan(
        processes=tuple(_processes(config, run_dir)),
        links=tuple(
            LinkPlan(link.name, link.hub, address, members)
            for (link, members), address in zip(_members(config), addresses, strict=True)
        ),
    )


def link_hubs(config: RunConfig) -> dict[str, str]:
    """The hub of every link, by the link's name, in the order of their ports. Raises `PlacementError`."""
    return {link.name: link.hub for link, _ in _members(config)}


def hub_addresses(config: RunConfig, ports: Sequence[int]) -> tuple[str, ...]:
    """The address of each link of `link_hubs`, at the host of its hub. Raises `PlacementError`."""
    places = place_processes(config)
    here = config.host_of(local_node(config))
    hosts = [places[hub].host if hub in places else here for hub in link_hubs(config).values()]
    return tuple(address for host, port in zip(hosts, ports, strict=True) for address in link_addresses(host, [port]))


def link_addresses(host: str, ports: Sequence[int]) -> tuple[str, ...]:
    """One ZeroMQ address per port. An IPv6 host is put in brackets."""
    shown_host = f"[{host}]" if ":" in host else host
    return tuple(f"tcp://{shown_host}:{port}" for port in ports)


def reports_per_step() -> dict[str, int]:
    """How often each process speaks about an optimiser step."""
    return {role.first: role.reports_per_step for role in ROLES if role.reports_per_step}


def _members(config: RunConfig) -> list[tuple[Link, tuple[str, ...]]]:
    names = {role.name: role_names(config, role) for role in ROLES}
    nodes = dict.fromkeys(place_processes(config)[name].node for of_role in names.values() for name in of_role)
    names[AGENT.name] = tuple(map(agent_name, nodes))
    return [(link, members) for link in LINKS if (members := link.members(names))]


def _processes(config: RunConfig, run_dir: Path) -> Iterator[ProcessSpec]:
    places = place_processes(config)
    for role in ROLES:
        for name in role_names(config, role):
            place = places[name]
            whose = ("--run-dir", str(run_dir), "--name", name, "--incarnation", "1")
            argv = module_command(role.module, *whose, python=python_of(config, place.node))
            env, timeout_s = _environment(config, role, name, places), role_config(config, role).start_timeout_s
            yield ProcessSpec(name, role.name, argv, env, timeout_s, place.node, place.host, place.devices)


def python_of(config: RunConfig, node: str) -> str:
    [settings] = (found for found in config.nodes if found.name == node)
    return settings.python or sys.executable


def imports_of(config: RunConfig, node: str) -> tuple[str, ...]:
    """The modules of the processes of a node, and what they load by name: those that import little first."""
    places = place_processes(config)
    here = [role for role in ROLES if any(places[name].node == node for name in role_names(config, role))]
    engine = ENGINE.built_in.get(config.generator.engine, "").partition(":")[0]
    modules: list[str] = []
    for role in sorted(here, key=lambda role: role.num_model_copies):
        modules += [engine] if role.decodes and engine else []
        modules.append(role.module)
    return tuple(modules)


def _environment(config: RunConfig, role: Role, name: str, places: Mapping[str, Place]) -> dict[str, str]:
    """Environment variables of a process. They limit numerical libraries, which otherwise use every core."""
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCH_NUM_THREADS")
    return {
        **dict.fromkeys(variables, str(role_config(config, role).threads)),
        "TOKENIZERS_PARALLELISM": "false",
        **(_visible_devices(places[name]) if any(place.devices for place in places.values()) else {}),
        **(_rank(config, role, name, places) if role.has_ranks else {}),
    }


def _visible_devices(place: Place) -> dict[str, str]:
    """A process sees only its own devices, as `cuda:0` onwards. Settings use the numbers of `nvidia-smi`."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, place.devices))}


def _rank(config: RunConfig, role: Role, name: str, places: Mapping[str, Place]) -> dict[str, str]:
    """As torchrun sets them; where the ranks meet travels over a link."""
    names = role_names(config, role)
    rank = names.index(name)
    local_rank = sum(places[other].node == places[name].node for other in names[:rank])
    return {"RANK": str(rank), "WORLD_SIZE": str(len(names)), "LOCAL_RANK": str(local_rank)}
