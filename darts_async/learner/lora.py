"""Low-rank adapters (arXiv 2106.09685) from `peft`: the model is frozen, and a few small matrices are trained.

    W' = W + scale * B A,    scale = alpha / rank

Layers are replaced inside the model, which remains a `PreTrainedModel`. No other process knows of adapters: the learner
publishes and saves the merged W', under the names that W has in the base model. Each is computed when it is needed, so
there is never a second model.

Invariants. Adapters start at W' = W. Their first values depend on the seed alone, so they are the same on all ranks. No
adapter is on the output head, with whose weight log-probabilities are computed. There is no dropout: the ratio to the
generator's probabilities would be noise at lag 0.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from darts_async.config import LoraConfig
from darts_async.errors import ConfigError, ModelError
from darts_async.learner.ranks.rank_info import RankInfo, rows_of
from darts_async.learner.ranks.sharding import local_rows, whole
from darts_async.protocol import TensorSpec
from darts_async.weights.bucket_layout import specs_of

ADAPTER = "default"
_FROZEN = ".base_layer."
"""peft puts this into the name of a parameter whose layer has an adapter."""


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freeze the model and add adapters to it, in place; before it is sharded. Raises `ConfigError` if peft is not
    installed, `ModelError` if the model has no such layers."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("learner.lora needs the extra `lora`: pip install 'darts-async[lora]'") from error
    targets = _targets(model, config.target_modules)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(targets),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in targets.values()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)


def adapters_off(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Have the model compute what it would without its adapters."""
    from peft.helpers import rescale_adapter_scale

    # Not by peft's own switch, which takes away `requires_grad` meanwhile, a flag that FSDP copies.
    off: AbstractContextManager[None] = rescale_adapter_scale(model, 0)
    return off


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether `add_adapters` was called."""
    return any(_adapted_layers(model))


@dataclass(frozen=True, slots=True)
class _Factors:
    """What an adapter adds to a weight: `scale * b @ a`, transposed if the layer stores [num_inputs, num_outputs]."""

    a: Tensor  # [rank, num_inputs]
    b: Tensor  # [num_outputs, rank]
    scale: float
    is_transposed: bool

    def copied(self) -> "_Factors":
        """As they are now, complete, in float32; a collective if they are sharded."""
        a, b = (whole(factor.detach()).to(torch.float32, copy=True) for factor in (self.a, self.b))
        return replace(self, a=a, b=b)


class MergedWeights(Mapping[str, Tensor]):
    """This rank's rows of every parameter at one version, by the names of the base model, each computed when it is
    needed. If there is one rank, it is a `WeightSource`. It keeps copies of the adapters, so it outlasts the version.
    """

    def __init__(self, frozen: Mapping[str, Tensor], factors: Mapping[str, _Factors], rank_info: RankInfo) -> None:
        self._frozen = frozen
        self._factors = factors
        self._rank_info = rank_info

    def __getitem__(self, name: str) -> Tensor:
        weight = local_rows(self._frozen[name].detach())
        if (found := self._factors.get(name)) is None:
            return weight
        left, right = (found.a.t(), found.b.t()) if found.is_transposed else (found.b, found.a)
        rows = slice(*rows_of(len(left), self._rank_info.rank, self._rank_info.num_ranks))
        # Added up in float32: in the weight's own bfloat16 the product would be rounded twice.
        return torch.addmm(weight.float(), left[rows], right, alpha=found.scale).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._frozen)

    def __len__(self) -> int:
        return len(self._frozen)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weight.shape) for name, weight in self._frozen.items()}

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return specs_of(self._frozen)

    def tensors(self) -> Generator[Tensor]:
        """Each parameter, whole if there is one rank."""
        assert self._rank_info.num_ranks == 1, "rows of several ranks are gathered first"
        yield from self.values()


class Adapters:
    """The adapters of a model, sharded or not. Parameters are looked up once: during a pass the module of a sharded
    model has gathered ones instead."""

    def __init__(self, model: PreTrainedModel, rank_info: RankInfo) -> None:
        self._rank_info = rank_info
        self._frozen = {
            base_name(name): weight for name, weight in model.named_parameters() if not weight.requires_grad
        }
        self._factors = {f"{name}.weight": _factors_of(layer) for name, layer in _adapted_layers(model)}

    @classmethod
    def of(cls, model: PreTrainedModel, rank_info: RankInfo) -> "Adapters | None":
        return cls(model, rank_info) if has_adapters(model) else None

    def merged(self) -> MergedWeights:
        """The weights of this version; a collective of all ranks."""
        factors = {name: factors.copied() for name, factors in self._factors.items()}
        return MergedWeights(self._frozen, factors, self._rank_info)


def _factors_of(layer: Any) -> _Factors:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return _Factors(a, b, layer.scaling[ADAPTER], layer.fan_in_fan_out)


def base_name(name: str) -> str:
    """The base model's name for a parameter or buffer of a model with adapters."""
    return name.replace(_FROZEN, ".")


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Recognised by their parts, so that peft need not be installed to find none."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _targets(model: PreTrainedModel, endings: tuple[str, ...]) -> dict[str, nn.Module]:
    """Linear layers except the head, by name: all, or those whose names have one of these endings."""
    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    for ending in endings:
        if not any(_ends(name, ending) for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ModelError(
                f"learner.lora.target_modules names {ending!r}, but no linear layer of {type(model).__name__} besides "
                f"its head is called so; there are {known or 'none'}"
            )
    return {name: layer for name, layer in layers.items() if not endings or any(_ends(name, each) for each in endings)}


def _ends(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")
