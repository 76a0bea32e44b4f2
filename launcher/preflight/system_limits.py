"""Compares the system's limits on processes with what the plan needs, so that a run does not fail later with "too many
open files" or without threads.

The needs follow from the settings, with constants of about twice what was measured in runs of the shipped
configurations. A limit that is not set is None.
"""

import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import psutil

from darts_async.config import RunConfig
from darts_async.errors import ModelError
from darts_async.models.location import resolve_model_path
from darts_async.topology.roles import GENERATOR, REWARD, Role, role_of
from launcher.plan.placement import Place, role_config
from launcher.problems import Problem, shown

_MIB = 1 << 20
_FILES = 96
"""Open files of a process that has no peer: logs, the event loop, libraries, the pieces of a model."""
_FILES_PER_PEER = 6
"""Further open files for each peer: sockets of the links and of two weight groups, and pipes."""
_THREADS = 40
"""Threads of a process that do not compute: those of ZeroMQ, gloo and the thread pool."""
_ADDRESS_SPACE_BYTES = 4096 * _MIB
"""Address space of a process without a model: the libraries."""
_BYTES_PER_THREAD = 72 * _MIB
"""Of address space: its stack, and the arena that the C library keeps for it."""
_NCCL_SHM_BYTES = 32 * _MIB
"""Of /dev/shm, for each process: its buffers between processes of a machine."""


class Limits(msgspec.Struct, frozen=True):
    open_files: int | None
    """Limit of a process, after it has raised its soft limit to the hard limit."""
    threads: int | None
    """Limit of this user."""
    threads_now: int
    address_space_bytes: int | None
    """Limit of a process."""
    shm_bytes: int | None
    """Free in /dev/shm; None if there is none."""


class Need(msgspec.Struct, frozen=True):
    """What the processes of a plan need on a machine."""

    open_files: int
    threads: int
    address_space_bytes: int | None
    """None: unlimited."""
    shm_bytes: int


def limits_here() -> Limits:
    """The limits of this process, which its children inherit."""
    # The kernel does not hold root to it.
    threads = None if os.geteuid() == 0 else _finite(resource.getrlimit(resource.RLIMIT_NPROC)[1])
    return Limits(
        open_files=_finite(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        threads=threads,
        threads_now=_threads_of_user() if threads is not None else 0,
        address_space_bytes=_finite(resource.getrlimit(resource.RLIMIT_AS)[0]),
        shm_bytes=psutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
    )


def weight_bytes(config: RunConfig) -> int:
    """Size of the model's files; 0 if they are not on this machine yet."""
    try:
        directory = resolve_model_path(config.model.path, with_weights=False)
    except ModelError:
        return 0  # the check of the model reports it
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def need_of(config: RunConfig, places: Mapping[str, Place], node: str, num_weight_bytes: int) -> Need:
    """What the plan needs on a node where some of its processes are."""
    roles = [role_of(name) for name, place in places.items() if place.node == node]
    memory = (_address_space(config, role, num_weight_bytes) for role in roles)
    uses_devices = any(place.devices for place in places.values() if place.node == node)
    num_workers = config.reward.workers if REWARD in roles else 0
    return Need(
        open_files=_FILES + _FILES_PER_PEER * (len(places) + num_workers + 2),
        threads=sum(_threads(config, role) for role in roles) + 2 * _THREADS,
        address_space_bytes=None if uses_devices else max(memory),
        shm_bytes=sum(_shm_bytes(config, role) for role in roles) if uses_devices else 0,
    )


def check_limits(need: Need, limits: Limits, node: str) -> Iterator[Problem]:
    """The limits of a machine that are too low for the plan."""
    place = f"nodes: {node}"
    if limits.open_files is not None and limits.open_files < need.open_files:
        message = f"a process may have {limits.open_files} open files on {node}, and this plan needs {need.open_files}"
        fix = _fix("ulimit -Hn", need.open_files, "LimitNOFILE", "--ulimit nofile")
        yield Problem(place, message, f"nofile {limits.open_files}", fix, here=True)
    num_threads = limits.threads_now + need.threads
    if limits.threads is not None and limits.threads < num_threads:
        message = (
            f"your user may have {limits.threads} processes and threads on {node}, has {limits.threads_now} now, and "
            f"this plan needs {need.threads} more"
        )
        fix = _fix("ulimit -Hu", num_threads, "LimitNPROC", "--ulimit nproc")
        yield Problem(place, message, f"nproc {limits.threads}", fix, here=True)
    yield from _check_memory(need, limits, node)


def _check_memory(need: Need, limits: Limits, node: str) -> Iterator[Problem]:
    place, allowed = f"nodes: {node}", limits.address_space_bytes
    if allowed is not None and (need.address_space_bytes is None or allowed < need.address_space_bytes):
        wanted = "no limit" if need.address_space_bytes is None else f"{need.address_space_bytes // 1024} KiB"
        number = "unlimited" if need.address_space_bytes is None else need.address_space_bytes // 1024
        message = f"a process may have {allowed // 1024} KiB of address space on {node}, and this plan needs {wanted}"
        yield Problem(
            place, message, f"ulimit -v {allowed // 1024}", _fix("ulimit -v", number, "LimitAS", None), here=True
        )
    if need.shm_bytes and (limits.shm_bytes is None or limits.shm_bytes < need.shm_bytes):
        wanted_mib, free_mib = -(-need.shm_bytes // _MIB), (limits.shm_bytes or 0) // _MIB
        message = f"/dev/shm has {free_mib} MiB free on {node}, and this plan needs {wanted_mib} MiB"
        fix = f"`mount -o remount,size={wanted_mib}M /dev/shm` as root, or --shm-size={wanted_mib}m of a container"
        yield Problem(place, message, shown(f"{free_mib} MiB"), fix, here=True)


def _fix(command: str, number: int | str, unit: str, container: str | None) -> str:
    others = f"{unit}={'infinity' if number == 'unlimited' else number} in a systemd unit"
    if container is not None:
        others += f", or {container}={number} of a container"
    return f"`{command} {number}` as root in this shell, or {others}"


def _threads(config: RunConfig, role: Role) -> int:
    workers = config.reward.workers if role is REWARD else 0
    return _THREADS + 2 * role_config(config, role).threads + 4 * workers


def _address_space(config: RunConfig, role: Role, num_weight_bytes: int) -> int:
    threads = 2 * role_config(config, role).threads
    num_bytes = _ADDRESS_SPACE_BYTES + role.num_model_copies * num_weight_bytes + _BYTES_PER_THREAD * threads
    return -(-num_bytes // _MIB) * _MIB  # a shell counts in KiB


def _shm_bytes(config: RunConfig, role: Role) -> int:
    nccl = _NCCL_SHM_BYTES if role.num_model_copies and config.weights.backend == "nccl" else 0
    return nccl + (config.generator.capabilities.shm_bytes if role is GENERATOR else 0)


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _threads_of_user() -> int:
    """The kernel counts them over all processes of the user."""
    uid, number = os.getuid(), 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == uid:
            number += process.info["num_threads"] or 1
    return number
