"""Every check that must fail before a process is started: a mistake costs a second, not a cluster's minutes.

Checks look at the world (files, ports, the reward function); what settings alone can tell is checked by
`darts_async.config`. Each check returns the problems it finds, and all are shown together. Nothing here
imports torch.
"""

import errno
import ipaddress
import json
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from darts_async.config import RunConfig
from darts_async.errors import ConfigError, DataError, ModelError, RewardError
from darts_async.models import load_tokenizer, resolve_model_path
from darts_async.prompts.load import load_prompts
from darts_async.reward.functions import load_function
from launcher.plan import LINKS
from launcher.problems import Problem, shown

_FREE_PORTS = range(20_000, 32_000)
"""Below what Linux gives to outgoing connections: such a one could take a port before its hub binds it."""


def check_run(config: RunConfig) -> tuple[Problem, ...]:
    """All problems of a run on this machine; empty when it may start. Takes the time of loading the prompts."""
    model = tuple(check_model(config))
    return (
        *check_network(config),
        *check_runs_dir(config),
        *check_devices(config),
        *check_script(config),
        *check_reward(config),
        *model,
        *(() if model else check_prompts(config)),  # without a tokenizer, prompts fail for the same reason
    )


def link_ports(config: RunConfig) -> tuple[int, ...]:
    """The ports of the links, in the order of `LINKS`: the configured block, or free ones. Raises `OSError`."""
    if config.network.base_port:
        return _block(config.network.base_port)
    for first in random.SystemRandom().sample(_FREE_PORTS, len(_FREE_PORTS)):
        if all(_is_free(config.network.host, port) for port in _block(first)):
            return _block(first)
    raise OSError(f"no {len(LINKS)} free ports in a row from {_FREE_PORTS.start} to {_FREE_PORTS.stop}")


def check_network(config: RunConfig) -> Iterator[Problem]:
    """The host is an address of this machine, and the ports of the block are free."""
    host = config.network.host
    try:
        if ipaddress.ip_address(host).is_unspecified:
            yield Problem("network.host", "would listen on every interface", shown(host), "name one address")
            return
        _bound(host, 0).close()
    except ValueError:
        yield Problem("network.host", "is not an IP address", shown(host), "write it in numbers: 127.0.0.1")
        return
    except OSError as error:
        message = f"is not an address of this machine ({error.strerror})"
        yield Problem("network.host", message, shown(host), "use 127.0.0.1, or an address that `ip addr` shows")
        return
    for port in link_ports(config) if config.network.base_port else ():
        try:
            _bound(host, port).close()
        except OSError as error:
            yield _port_problem(config, port, error)


def check_runs_dir(config: RunConfig) -> Iterator[Problem]:
    """A directory can be made in `runs_dir`, which itself may still have to be made."""
    path = Path(config.runs_dir).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        yield Problem("runs_dir", f"{existing} is a file", shown(config.runs_dir), "name a directory")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Problem("runs_dir", f"{existing} cannot be written to", shown(config.runs_dir), "choose another one")


def check_devices(config: RunConfig) -> Iterator[Problem]:
    """NCCL moves weights between GPUs, and these engines and this learner hold theirs in host memory."""
    if config.weights.backend == "nccl":
        engine = config.generator.engine
        yield Problem(
            "weights.backend", f"the engine {engine!r} holds its weights in host memory", "'nccl'", "use gloo"
        )


def check_script(config: RunConfig) -> Iterator[Problem]:
    """The trace of the scripted engine is there."""
    trace = config.generator.script.trace_path if config.generator.script else None
    if config.generator.engine == "scripted" and trace is not None and not Path(trace).is_file():
        fix = "give the path of an .npz file, or leave it out"
        yield Problem("generator.script.trace_path", "there is no such file", shown(trace), fix)


def check_reward(config: RunConfig) -> Iterator[Problem]:
    """The reward function can be imported and called."""
    try:
        load_function(config.reward.function)
    except RewardError as error:
        yield Problem("reward.function", str(error), shown(config.reward.function))


def check_model(config: RunConfig) -> Iterator[Problem]:
    """The model's files are there, and its context and vocabulary hold what the run asks for."""
    try:
        directory = resolve_model_path(config.model.path, with_weights=False)
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


def check_prompts(config: RunConfig) -> Iterator[Problem]:
    """Tokenizer and data sets load, no set is empty, and every prompt fits."""
    try:
        load_prompts(config)
    except ModelError as error:
        yield Problem("model.path", str(error), shown(config.model.path))
    except (ConfigError, DataError) as error:
        yield Problem("prompts", str(error))


def _check_model_fits(config: RunConfig, described: dict[str, Any], num_tokens: int) -> Iterator[Problem]:
    limit, wanted = described.get("max_position_embeddings"), config.generator.max_context_tokens
    if isinstance(limit, int) and wanted > limit:
        message = f"the model was made for {limit} tokens (max_position_embeddings)"
        yield Problem("generator.max_context_tokens", message, shown(wanted), f"use {limit} or less")
    vocabulary = described.get("vocab_size")
    if isinstance(vocabulary, int) and num_tokens > vocabulary:
        message = f"its tokenizer has {num_tokens} tokens, but the model's vocab_size is {vocabulary}"
        yield Problem("model.path", message, shown(config.model.path), "save the tokenizer that belongs to the model")


def _block(first_port: int) -> tuple[int, ...]:
    return tuple(range(first_port, first_port + len(LINKS)))


def _port_problem(config: RunConfig, port: int, error: OSError) -> Problem:
    what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be bound ({error.strerror})"
    fix = f"choose a base_port with {len(LINKS)} free ports behind it, or 0 for free ones"
    return Problem("network.base_port", f"port {port} {what}", shown(config.network.base_port), fix)


def _is_free(host: str, port: int) -> bool:
    try:
        _bound(host, port).close()
    except OSError:
        return False
    return True


def _bound(host: str, port: int) -> socket.socket:
    """A socket bound to that address. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
