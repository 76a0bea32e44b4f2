"""Plans the processes and links of a run from its settings. Pure, so a dry run shows exactly what a run would start.

    link         bound by     members
    generators   shaper       generator/*     work out, tokens back
    rewards      shaper       reward/*        responses out, rewards back
    learner      shaper       learner/0       groups out, commits back
    weights      learner/0    generator/*     control of the weight broadcast
    launcher     launcher     every process   status, shutdown
    agents       launcher     agent/*         of each node: what is to be started and ended there, and what has ended
    ranks        learner/0    learner/1...    a learner of several ranks: their work, and where they meet

Addresses are an argument, because only the machine knows which ports are free.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from darts_async.config import RunConfig
from darts_async.machine.spawn import module_command
from darts_async.topology import AGENTS_LINK, LAUNCHER, LinkPlan, ProcessSpec, RunPlan, agent_name
from launcher.plan.placement import ROLES, Place, Role, local_node, place_processes, role_config, role_names

_SHAPER = "shaper/0"
_LEARNER = "learner/0"


def plan_run(config: RunConfig, run_dir: Path, addresses: Sequence[str]) -> RunPlan:
    """The processes and links of a run; `addresses[i]` is for link i of `link_hubs`. Raises `PlacementError`."""
    processes = tuple(_processes(config, run_dir))
    return RunPlan(
        processes=processes,
        links=tuple(
            LinkPlan(name, hub, address, _members(config, name, processes))
            for (name, hub), address in zip(link_hubs(config).items(), addresses, strict=True)
        ),
    )


def link_hubs(config: RunConfig) -> dict[str, str]:
    """The hub of every link, by the link's name, in the order of their ports."""
    hubs = {"generators": _SHAPER, "rewards": _SHAPER, "learner": _SHAPER, "weights": _LEARNER}
    hubs |= {"launcher": LAUNCHER, AGENTS_LINK: LAUNCHER}
    return {**hubs, "ranks": _LEARNER} if config.roles.learner.replicas > 1 else hubs


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


def reports_per_step(plan: RunPlan) -> dict[str, int]:
    """Number of reports of each process about an optimiser step: one of the shaper, and two of the learner, after the
    step and when the version is published."""
    return {plan.link("learner").hub: 1, plan.link("weights").hub: 2}


def _members(config: RunConfig, link: str, processes: Sequence[ProcessSpec]) -> tuple[str, ...]:
    match link:
        case "generators" | "weights":
            return role_names(config, "generator")
        case "rewards":
            return role_names(config, "reward")
        case "learner":
            return (_LEARNER,)
        case "ranks":
            return role_names(config, "learner")[1:]
        case str() if link == AGENTS_LINK:
            return tuple(agent_name(node) for node in dict.fromkeys(spec.node for spec in processes))
        case _:
            return tuple(name for role in ROLES for name in role_names(config, role))


def _processes(config: RunConfig, run_dir: Path) -> Iterator[ProcessSpec]:
    places = place_processes(config)
    for role in ROLES:
        settings = role_config(config, role)
        for name in role_names(config, role):
            place = places[name]
            argv, env = (
                _command(role, name, run_dir, python_of(config, place.node)),
                _environment(config, role, name, places),
            )
            yield ProcessSpec(name, role, argv, env, settings.start_timeout_s, place.node, place.host, place.devices)


def python_of(config: RunConfig, node: str) -> str:
    """Path of the Python on a node."""
    [settings] = (found for found in config.nodes if found.name == node)
    return settings.python or sys.executable


def _command(role: Role, name: str, run_dir: Path, python: str) -> tuple[str, ...]:
    whose = ("--run-dir", str(run_dir), "--name", name, "--incarnation", "1")
    return module_command(f"darts_async.{role}.process", *whose, python=python)


def _environment(config: RunConfig, role: Role, name: str, places: Mapping[str, Place]) -> dict[str, str]:
    """Environment variables of a process. They limit numerical libraries, which otherwise use every core."""
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCH_NUM_THREADS")
    return {
        **dict.fromkeys(variables, str(role_config(config, role).threads)),
        "TOKENIZERS_PARALLELISM": "false",
        **(_visible_devices(places[name]) if any(place.devices for place in places.values()) else {}),
        **(_rank(config, name, places) if role == "learner" else {}),
    }


def _visible_devices(place: Place) -> dict[str, str]:
    """A process sees only its own devices, as `cuda:0` onwards. Settings use the numbers of `nvidia-smi`."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, place.devices))}


def _rank(config: RunConfig, name: str, places: Mapping[str, Place]) -> dict[str, str]:
    """The variables of torchrun, except the rendezvous address, which is sent over the link `ranks`."""
    names = role_names(config, "learner")
    rank = names.index(name)
    local_rank = sum(places[other].node == places[name].node for other in names[:rank])
    return {"RANK": str(rank), "WORLD_SIZE": str(len(names)), "LOCAL_RANK": str(local_rank)}
