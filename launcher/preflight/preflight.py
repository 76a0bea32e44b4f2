"""Checks a run before any process starts, so that a mistake costs a second and not the time of a cluster.

The checks look at files, ports, what the run brings itself and the placement of processes. `darts_async.config` checks
what follows from the settings alone. Each check returns its problems, and all are shown together. A `Problem` that is
`here` is one of this machine. This module does not import torch.
"""

import importlib.util
import ipaddress
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from darts_async.config import NodeConfig, RunConfig
from darts_async.config.paths import expanded, is_file, missing_file
from darts_async.config.prompts import RecordsConfig
from darts_async.errors import ConfigError, DataError, ModelError
from darts_async.extensions import HUB, TASKS
from darts_async.models.length_limits import bounds, text_part
from darts_async.models.location import load_tokenizer, resolve_model_path
from darts_async.prompts.hub import DEFAULT_SPLIT, UnreachableError, find_split
from darts_async.prompts.load import PromptCounts
from darts_async.topology.roles import GENERATOR
from launcher.control.metrics_server import HOST
from launcher.plan.devices import check_backend, check_gpus, check_vllm
from launcher.plan.placement import Place, PlacementError, local_node, place_processes, role_names
from launcher.plan.plan import link_hubs
from launcher.plan.ports import block, free_block, why_not_bound
from launcher.preflight.extension_check import check_extensions, check_prompts
from launcher.preflight.model_check import ModelTrial, check_files, local_models
from launcher.preflight.prompt_check import Found
from launcher.preflight.remote_preflight import check_nodes
from launcher.preflight.reward_check import check_rewards
from launcher.preflight.system_limits import check_limits, limits_here, need_of, weight_bytes
from launcher.problems import Problem, shown


@dataclass(frozen=True, slots=True)
class Findings:
    """The results of all checks."""

    problems: tuple[Problem, ...]
    """Empty if the run may start here."""
    hints: tuple[Problem, ...]
    """Problems that are shown and do not prevent a run."""
    prompts: PromptCounts | None
    """None if they cannot be loaded."""


def check_run(config: RunConfig, *, reaches_nodes: bool = False) -> Findings:
    """Check everything that a run needs. `reaches_nodes`: also on the other nodes."""
    model, data = tuple(check_model(config)), tuple(check_data_files(config))
    models = local_models(config)
    files = tuple(check_files(models))
    with ModelTrial(config, {} if model or files else models) as trial:
        prompts = Found() if model or data else check_prompts(config)  # without these, it fails for the same reason
        found = (
            *check_network(config),
            *check_prometheus_port(config),
            *check_runs_dir(config),
            *_check_places(config, reaches_nodes=reaches_nodes),
            *check_script(config),
            *check_extensions(config),
            *check_rewards(config),
            *check_adapters(config),
            *(model + files + data + prompts.problems),
            *trial.problems(),
        )
    return Findings(
        problems=tuple(problem for problem in found if not problem.is_hint),
        hints=tuple(problem for problem in found if problem.is_hint),
        prompts=prompts.counts,
    )


def link_ports(config: RunConfig) -> tuple[int, ...]:
    """The ports of the links, in the order of `link_hubs`: the configured block, or free ones. Raises `OSError`."""
    count = len(link_hubs(config))
    if config.network.base_port:
        return block(config.network.base_port, count)
    return free_block(config.host_of(local_node(config)), count)


def check_network(config: RunConfig) -> Iterator[Problem]:
    """Hosts are addresses, the local one is of this machine, and the ports of the block are free on it."""
    wrong = tuple(problem for node in config.nodes for problem in _check_address(*_host_setting(config, node)))
    yield from wrong
    if wrong:
        return
    hosts = {config.host_of(node) for node in config.nodes}
    inner = sorted(host for host in hosts if ipaddress.ip_address(host).is_loopback)
    if inner and len(inner) < len(hosts):
        message = f"{inner[0]} is only reachable from its own machine, but the nodes are at {', '.join(sorted(hosts))}"
        yield Problem("nodes", message, shown(inner[0]), "give the address at which the other nodes reach it")
    setting, host = _host_setting(config, local_node(config))
    if (reason := why_not_bound(host, 0)) is not None:
        fix = "use 127.0.0.1, or an address that `ip addr` shows"
        yield Problem(setting, f"is not an address of this machine: {reason}", shown(host), fix, here=True)
        return
    for port in link_ports(config) if config.network.base_port else ():
        if (reason := why_not_bound(host, port)) is not None:
            fix = f"choose a base_port that begins {len(link_hubs(config))} free ports, or 0 for any free ports"
            value = shown(config.network.base_port)
            yield Problem("network.base_port", f"port {port} {reason}", value, fix, here=True)


def check_prometheus_port(config: RunConfig) -> Iterator[Problem]:
    """The launcher can listen there."""
    if not (port := config.telemetry.prometheus_port):
        return
    setting, fix = "telemetry.prometheus_port", "choose a free port, or 0 to serve no metrics"
    if config.network.base_port and port in link_ports(config):
        yield Problem(setting, "is a port of the links (network.base_port)", shown(port), fix)
    elif (reason := why_not_bound(HOST, port)) is not None:
        yield Problem(setting, f"port {port} of {HOST} {reason}", shown(port), fix, here=True)


def check_runs_dir(config: RunConfig) -> Iterator[Problem]:
    """A directory can be created in `runs_dir`, which need not exist yet."""
    try:
        path = config.runs_path
    except ConfigError as error:
        yield Problem("runs_dir", str(error), shown(config.runs_dir), here=True)
        return
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        yield Problem("runs_dir", f"{existing} is a file", shown(config.runs_dir), "name a directory", here=True)
    elif not os.access(existing, os.W_OK | os.X_OK):
        message = f"{existing} cannot be written to"
        yield Problem("runs_dir", message, shown(config.runs_dir), "choose another one", here=True)


def check_script(config: RunConfig) -> Iterator[Problem]:
    """The trace of the scripted engine exists."""
    trace = config.generator.script.trace_path if config.generator.script else None
    if not config.generator.capabilities.has_model and trace is not None:
        yield from _check_file("generator.script.trace_path", trace, "give the path of an .npz file, or leave it out")


def check_adapters(config: RunConfig) -> Iterator[Problem]:
    """The package that trains adapters is installed."""
    if config.learner.lora is not None:
        yield from _lacking("peft", "lora", "learner.lora", "adapters need", f"rank {config.learner.lora.rank}")


def check_ssh(config: RunConfig, places: Mapping[str, Place]) -> tuple[Problem, ...]:
    """The package that reaches other nodes is installed."""
    if all(place.node == local_node(config).name for place in places.values()):
        return ()
    return tuple(_lacking("asyncssh", "ssh", "nodes", "other nodes need", shown(len(config.nodes))))


def _lacking(package: str, extra: str, setting: str, needing: str, value: str) -> Iterator[Problem]:
    if importlib.util.find_spec(package) is None:
        message, fix = f"{needing} the package {package}", f"pip install 'darts-async[{extra}]'"
        yield Problem(setting, message, value, fix, here=True)


def check_model(config: RunConfig) -> Iterator[Problem]:
    """The model's files exist, and its context and vocabulary are large enough."""
    try:
        directory = resolve_model_path(config.model.path, with_weights=False)
    except (ConfigError, ModelError) as error:
        yield Problem("model.path", str(error), shown(config.model.path), here=True)
        return
    try:
        num_tokens = load_tokenizer(directory).get_vocab_size()
    except ModelError as error:
        yield Problem("model.path", str(error), shown(config.model.path))
        return
    try:
        described = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield Problem("model.path", f"its config.json cannot be read: {error}", shown(config.model.path))
        return
    yield from _check_model_fits(config, described, num_tokens)


def check_data_files(config: RunConfig) -> Iterator[Problem]:
    """The files exist, data sets of the hub can be fetched, and the packages that read and make them are installed."""
    for where, section in config.record_sections.items():
        if section.source == HUB:
            yield from _check_hub(f"{where}.path", section)
            continue
        for setting, path in (("path", section.path), ("held_out_path", section.held_out_path)):
            if path is not None:
                yield from _check_file(f"{where}.{setting}", path, "give the path of a file of records")
        if section.source == "parquet":
            yield from _lacking("pyarrow", "data", f"{where}.source", "parquet files need", "'parquet'")
        if section.source == TASKS:
            yield from _lacking("reasoning_gym", "reasoning-gym", f"{where}.source", "tasks need", f"'{TASKS}'")


def _check_hub(setting: str, section: RecordsConfig) -> Iterator[Problem]:
    try:
        for split in filter(None, (section.split or DEFAULT_SPLIT, section.held_out_split)):
            find_split(section.path or "", subset=section.subset, split=split, revision=section.revision)
    except (ConfigError, DataError) as error:
        yield Problem(setting, str(error), shown(section.path), here=isinstance(error, UnreachableError))


def _check_file(setting: str, text: str, fix: str) -> Iterator[Problem]:
    try:
        path = expanded(text, setting)
    except ConfigError as error:
        yield Problem(setting, str(error), shown(text), here=True)
        return
    if not is_file(path):
        yield Problem(setting, missing_file(path), shown(text), fix, here=True)


def _check_places(config: RunConfig, *, reaches_nodes: bool) -> Iterator[Problem]:
    """Every process has a place, engine and backend fit it, and this machine has the devices."""
    try:
        places = place_processes(config)
    except PlacementError as error:
        yield error.problem
        return
    yield from check_backend(config, places)
    yield from check_gpus(config, places)
    local = local_node(config).name
    if any(place.node == local for place in places.values()):
        yield from check_limits(need_of(config, places, local, weight_bytes(config)), limits_here(), local)
    if any(places[name].node == local_node(config).name for name in role_names(config, GENERATOR)):
        yield from check_vllm(config)
    yield from _check_far_hubs(config, places)
    if reaches_nodes:
        yield from check_ssh(config, places) or check_nodes(config, places)


def _check_far_hubs(config: RunConfig, places: Mapping[str, Place]) -> Iterator[Problem]:
    local = local_node(config).name
    far_hubs = sorted({hub for hub in link_hubs(config).values() if hub in places and places[hub].node != local})
    if far_hubs and not config.network.base_port:
        message = f"free ports can only be found on {local}, but {', '.join(far_hubs)} listens elsewhere"
        yield Problem("network.base_port", message, "0", "set the first of a block of ports that is free everywhere")


def _host_setting(config: RunConfig, node: NodeConfig) -> tuple[str, str]:
    """The setting that decides the address of a node, and the address."""
    return ("network.host" if node.host is None else f"nodes: {node.name}.host"), config.host_of(node)


def _check_address(name: str, host: str) -> Iterator[Problem]:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        yield Problem(name, "is not an IP address", shown(host), "write a numeric address: 127.0.0.1")
        return
    if address.is_unspecified:
        yield Problem(name, "would listen on every interface", shown(host), "name one address")


def _check_model_fits(config: RunConfig, described: dict[str, Any], num_tokens: int) -> Iterator[Problem]:
    wanted = config.generator.max_context_tokens
    for bound in bounds(described)[:1]:
        if wanted > bound.value:
            message = f"{bound.reason} ({bound.setting})"
            yield Problem("generator.max_context_tokens", message, shown(wanted), f"use {bound.value} or less")
    vocabulary = text_part(described).get("vocab_size")
    if isinstance(vocabulary, int) and num_tokens > vocabulary:
        message = f"its tokenizer has {num_tokens} tokens, but the model's vocab_size is {vocabulary}"
        yield Problem("model.path", message, shown(config.model.path), "save the tokenizer that belongs to the model")
