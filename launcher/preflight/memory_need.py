"""How much memory the processes of a plan need for weights, gradients, optimiser and KV cache. Pure, but for
`model_size`, which reads headers and the configuration of a model, and no weights.

Activations, libraries and the allocator come on top, so the numbers are a lower bound. With P parameters:

    learner     weights P, a float32 copy for the updates if they have fewer bits, float32 gradients P, AdamW 2 P;
                with several ranks all of this is sharded, in float32. Adapters have the last two for themselves alone
    reference   weights P, where there is a divergence from it and no adapters
    generator   weights P, and P again for those that arrive while it decodes; KV cache of all slots
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from darts_async.config import RunConfig
from darts_async.models.length_limits import text_part
from darts_async.models.weight_files import read_header
from darts_async.topology.roles import GENERATOR, LEARNER, role_of
from launcher.plan.placement import Place
from launcher.problems import Problem, shown

_FLOAT32 = 4
_GIB = 1 << 30
_NOT_ADAPTED = "embed", "lm_head"


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the headers and the configuration tell of a model."""

    num_parameters: int
    matrix_sides: int
    """Rows and columns of all matrices that may have an adapter, added up."""
    kv_values_per_token: int
    """Numbers that the KV cache holds for a token; 0 if the configuration does not tell."""


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """What one process needs, by what it is for, in bytes."""

    name: str
    place: Place
    parts: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def model_size(directory: Path) -> ModelSize | None:
    """The size of a model. None if its files cannot be read or have another format."""
    try:
        described = text_part(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        entries = {name: each for file in directory.glob("*.safetensors") for name, each in read_header(file).items()}
    except (OSError, ValueError):
        return None
    if not entries:
        return None
    shapes = {name: entry.shape for name, entry in entries.items()}
    sides = [
        sum(shape) for name, shape in shapes.items() if len(shape) == 2 and not any(no in name for no in _NOT_ADAPTED)
    ]
    return ModelSize(sum(map(math.prod, shapes.values())), sum(sides), _kv_values(described))


def _kv_values(described: Mapping[str, object]) -> int:
    num_layers, heads = described.get("num_hidden_layers"), described.get("num_attention_heads")
    hidden, kv_heads = described.get("hidden_size"), described.get("num_key_value_heads") or heads
    if not (isinstance(num_layers, int) and isinstance(heads, int) and isinstance(kv_heads, int)):
        return 0
    head_dim = described.get("head_dim") or (hidden // heads if isinstance(hidden, int) and heads else 0)
    return 2 * num_layers * kv_heads * head_dim if isinstance(head_dim, int) else 0


def memory_of(config: RunConfig, places: Mapping[str, Place], size: ModelSize) -> list[ProcessMemory]:
    """The processes that hold a model."""
    found = []
    for name, place in places.items():
        if role_of(name) is LEARNER and config.learner.script is None:
            found.append(ProcessMemory(name, place, _learner(config, size)))
        elif role_of(name) is GENERATOR and config.generator.capabilities.has_model:
            found.append(ProcessMemory(name, place, _generator(config, size)))
    return found


def _learner(config: RunConfig, size: ModelSize) -> dict[str, int]:
    learner, num_ranks = config.learner, config.roles.learner.replicas
    width = _FLOAT32 if num_ranks > 1 else _bytes_of(config)
    weights = size.num_parameters * width
    trained = size.num_parameters if learner.lora is None else size.matrix_sides * learner.lora.rank
    copy = trained * _FLOAT32 if width < _FLOAT32 and learner.lora is None else 0
    has_reference = learner.loss.kl_weight > 0 and learner.lora is None
    parts = {
        "model weights": weights,
        "float32 copy": copy,
        "gradients": trained * _FLOAT32,
        "optimiser": 2 * trained * _FLOAT32,
        "reference": size.num_parameters * _bytes_of(config) if has_reference else 0,
    }
    return {what: -(-num_bytes // num_ranks) for what, num_bytes in parts.items() if num_bytes}


def _generator(config: RunConfig, size: ModelSize) -> dict[str, int]:
    generator, vllm = config.generator, config.generator.vllm
    num_ranks = max(1, config.roles.generator.devices)
    tokens = generator.num_slots * generator.max_context_tokens
    if generator.capabilities.has_workers and vllm.kv_tokens_per_sample is not None:
        tokens = generator.num_slots * min(vllm.kv_tokens_per_sample, generator.max_context_tokens)
    cache = tokens * size.kv_values_per_token * _bytes_of(config)
    if generator.capabilities.has_workers and vllm.kv_cache_bytes is not None:
        cache = vllm.kv_cache_bytes * num_ranks
    weights = size.num_parameters * _bytes_of(config)
    parts = {"model weights": weights, "arriving weights": weights, "KV cache": cache}
    return {what: num_bytes for what, num_bytes in parts.items() if num_bytes}


def _bytes_of(config: RunConfig) -> int:
    return _FLOAT32 if config.model.dtype == "float32" else 2


def host_need(needs: list[ProcessMemory], node: str) -> int:
    """What all processes of a node without devices need together, in bytes."""
    return sum(each.num_bytes for each in needs if each.place.node == node and not each.place.devices)


def device_needs(needs: list[ProcessMemory], node: str) -> dict[int, int]:
    """What the processes of a node need on each of its devices, in bytes."""
    found: dict[int, int] = {}
    for each in needs:
        for device in each.place.devices if each.place.node == node else ():
            found[device] = found.get(device, 0) + each.num_bytes // len(each.place.devices)
    return found


def check_memory(
    needs: list[ProcessMemory], node: str, host_bytes: int, device_bytes: Mapping[int, int]
) -> Iterator[Problem]:
    """Hints about a machine with less memory than the plan needs. `host_bytes`: what is available there;
    `device_bytes`: what each device has; those that are not in it are not compared."""
    fix = (
        "lower generator.num_slots or max_context_tokens, use model.dtype bfloat16, learner.lora or a smaller model, "
        "or spread the roles over more devices"
    )
    place = f"nodes: {node}"
    if (need := host_need(needs, node)) > host_bytes:
        message = f"the plan needs {gib(need)} and more of memory on {node}, and {gib(host_bytes)} are available"
        yield Problem(place, message, gib(host_bytes), fix, is_hint=True)
    for device, need in sorted(device_needs(needs, node).items()):
        there = device_bytes.get(device)
        if there is not None and need > there:
            message = f"the plan needs {gib(need)} and more on GPU {device} of {node}, which has {gib(there)}"
            yield Problem(f"{place}.devices", message, shown(device), fix, is_hint=True)


def gib(num_bytes: int) -> str:
    """A size as text: `1.4 GiB`, or MiB below one."""
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / (1 << 20):.1f} MiB"
