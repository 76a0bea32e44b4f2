"""Checks all other nodes in parallel over ssh before a run starts.

Every process reads the run directory, so all nodes must see `runs_dir` under one path. Processes exchange typed
messages and weights, so Python and the relevant packages must have the same versions. What a role needs must exist on
its nodes. An unreachable node is a problem like the others.
"""

import asyncio
import contextlib
import os
import platform
import secrets
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path

import msgspec

from darts_async.config import NodeConfig, RunConfig
from darts_async.config.engines import VLLM
from darts_async.extensions import ENGINE, HUB, LOSS, PROMPTS, REWARD, RULE
from darts_async.machine.spawn import module_command
from darts_async.topology import roles
from darts_async.topology.roles import READS_MODEL, READS_PROMPTS, role_of
from launcher.nodes.backends import AgentCommand, NodeError
from launcher.plan.placement import Place
from launcher.plan.plan import link_hubs, python_of
from launcher.plan.ports import block
from launcher.preflight.node_inspection import Answer, Question, versions_here
from launcher.preflight.system_limits import check_limits, need_of, weight_bytes
from launcher.problems import Problem, shown

_LOADED_BY = (
    (roles.REWARD, REWARD),
    (roles.SHAPER, PROMPTS),
    (roles.SHAPER, RULE),
    (roles.LEARNER, LOSS),
    (roles.GENERATOR, ENGINE),
)
"""Which extensions a role loads. Sinks are the launcher's own."""


def check_nodes(config: RunConfig, places: Mapping[str, Place]) -> Iterator[Problem]:
    """The problems of every other node that has processes."""
    nodes = [node for node in config.nodes[1:] if any(place.node == node.name for place in places.values())]
    if not nodes:
        return
    with _shared_file(config) as (path, text):
        questions = [(node, _question(config, places, node, path, text)) for node in nodes]
        answers = asyncio.run(_ask_all(config, questions))
    num_bytes = weight_bytes(config)
    for node, answer in zip(nodes, answers, strict=True):
        if isinstance(answer, NodeError):
            yield Problem(f"nodes: {node.name}", answer.reason, fix=answer.fix, here=True)
        else:
            yield from problems_of(config, places, node, answer)
            if answer.limits is not None:
                yield from check_limits(need_of(config, places, node.name, num_bytes), answer.limits, node.name)


def problems_of(config: RunConfig, places: Mapping[str, Place], node: NodeConfig, answer: Answer) -> Iterator[Problem]:
    """The problems of a node that has answered. Pure."""
    setting = f"nodes: {node.name}"
    yield from _versions(config, node, answer)
    if not answer.sees_shared_file:
        message = f"{node.name} does not see the directory {config.runs_path} of this machine"
        fix = "set runs_dir to a directory on storage that all nodes share, under one path"
        yield Problem("runs_dir", message, shown(config.runs_dir), fix, here=True)
    for port, reason in answer.unbound.items():
        if port == 0:
            fix = "give one that `ip addr` shows there"
            yield Problem(f"{setting}.host", f"is not an address there: {reason}", shown(node.host), fix, here=True)
        elif 0 not in answer.unbound:
            fix = "choose a base_port that is free there too"
            value = shown(config.network.base_port)
            yield Problem("network.base_port", f"port {port} {reason} on {node.name}", value, fix, here=True)
    wanted = {device for place in places.values() if place.node == node.name for device in place.devices}
    if absent := sorted(wanted - set(answer.gpus)):
        has = ", ".join(map(str, answer.gpus)) or "none"
        message = f"it has no GPU {', '.join(map(str, absent))}; nvidia-smi shows {has} there"
        yield Problem(f"{setting}.devices", message, shown(list(node.devices)), here=True)
    for name in answer.missing_paths:
        fix = "put it there, or on storage that all nodes share"
        yield Problem(name, f"there is no such file on {node.name}", shown(attrgetter(name)(config)), fix, here=True)
    for name in answer.missing_modules:
        message = f"its module cannot be imported on {node.name}"
        yield Problem(name, message, shown(attrgetter(name)(config)), "install it there", here=True)


def _versions(config: RunConfig, node: NodeConfig, answer: Answer) -> Iterator[Problem]:
    here, setting = platform.python_version(), f"nodes: {node.name}.python"
    if here.split(".")[:2] != answer.python.split(".")[:2]:
        message = f"{node.name} has Python {answer.python}, but this machine has {here}"
        yield Problem(setting, message, shown(python_of(config, node.name)), "use the same version", here=True)
    for package, mine in sorted(versions_here().items()):
        theirs = answer.versions.get(package)
        if theirs != mine and not (theirs is None and package in VLLM.packages):
            there = f"{package} {theirs}" if theirs else f"no {package}"
            message = f"{node.name} has {there}, but this machine has {mine}"
            python = shown(python_of(config, node.name))
            yield Problem(setting, message, python, f"install {package} {mine} there", here=True)
    packages = config.generator.capabilities.packages
    if packages and answer.versions.keys().isdisjoint(packages):
        message = f"{node.name} has no vLLM"
        yield Problem("generator.engine", message, "'vllm'", "install it there as the README says", here=True)


def _question(config: RunConfig, places: Mapping[str, Place], node: NodeConfig, path: Path, text: str) -> Question:
    host = config.host_of(node)
    hubs, names = link_hubs(config), {name for name, at in places.items() if at.node == node.name}
    first_port = config.network.base_port
    ports = block(first_port, len(hubs)) if first_port else ()
    return Question(
        shared_file=str(path),
        shared_text=text,
        host=host,
        ports=tuple(port for port, hub in zip(ports, hubs.values(), strict=False) if hub in names),
        paths=dict(_paths(config, {what for name in names for what in role_of(name).reads})),
        modules=dict(_modules(config, set(map(role_of, names)))),
    )


def _paths(config: RunConfig, read: set[str]) -> Iterator[tuple[str, str]]:
    model = config.model.path
    if model.startswith(("/", "~", "$")) and READS_MODEL in read:
        yield "model.path", model
    if READS_PROMPTS in read:
        for where, section in config.record_sections.items():
            for setting, path in (("path", section.path), ("held_out_path", section.held_out_path)):
                if path is not None and section.source != HUB:
                    yield f"{where}.{setting}", path


def _modules(config: RunConfig, here: set[roles.Role]) -> Iterator[tuple[str, str]]:
    for role, kind in _LOADED_BY:
        sources = (section.source for section in config.record_sections.values())
        names = (
            sources if kind is PROMPTS else (*kind.names_in(config), *(config.own_rewards if kind is REWARD else ()))
        )
        for name in names if role in here else ():
            if name not in kind.built_in:
                yield kind.setting, name.partition(":")[0]


async def _ask_all(config: RunConfig, questions: Iterable[tuple[NodeConfig, Question]]) -> list[Answer | NodeError]:
    return await asyncio.gather(*(_ask(config, node, question) for node, question in questions))


async def _ask(config: RunConfig, node: NodeConfig, question: Question) -> Answer | NodeError:
    from launcher.nodes.backends.ssh import run_there  # a run on one machine needs no ssh

    argv = module_command("launcher.preflight.node_inspection", python=python_of(config, node.name))
    command = AgentCommand(argv, node.env, node.workdir or os.getcwd())
    try:
        printed = await run_there(node, config.host_of(node), command, msgspec.to_builtins(question))
        return msgspec.json.decode(printed, type=Answer)
    except NodeError as error:
        return error
    except msgspec.DecodeError:
        fix = "install the same version there"
        return NodeError(node.name, f"its darts-async is of another version: it answers {shown(printed)}", fix)


@contextlib.contextmanager
def _shared_file(config: RunConfig) -> Iterator[tuple[Path, str]]:
    """A file in `runs_dir` with a random name and text, by which nodes show that they see the directory."""
    directory = config.runs_path
    made = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    text = secrets.token_hex(16)
    path = directory / f".seen-by-all-{text}"
    path.write_text(text, encoding="utf-8")
    try:
        yield path, text
    finally:
        path.unlink(missing_ok=True)
        for parent in made:  # `validate` leaves no files
            parent.rmdir()
