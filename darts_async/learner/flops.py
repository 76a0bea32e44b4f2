"""Counts the floating-point operations of a training pass from the model's layers, and the utilisation of a device.

A forward pass takes, with 2 operations for a multiplication and an addition:

    2 * weights of all linear layers but the head        per packed token
    2 * weights of the head                              per target: other tokens have no logits
    4 * heads * head_size                                per layer and pair of a query and a key that it sees

A sequence of n tokens has n (n + 1) / 2 such pairs, fewer where a layer has a window. A prompt that several samples
share is computed, and counted, once (see `tree`). The backward pass takes twice as much; for frozen weights (see
`lora`), which have no gradient, once as much. Recomputation to save memory is not counted: this is model FLOPs
utilisation as defined for PaLM (arXiv 2204.02311, appendix B), except that pairs that a causal mask hides are not
counted either.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from darts_async.learner.packing.tree import Tree

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
}
"""Dense 16-bit operations per second by a part of the device's name, from the makers' data sheets; the first fits."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Operations of a forward pass."""

    per_token: int
    per_target: int
    per_pair: int
    windows: tuple[int | None, ...]
    """Of each layer: how many keys a query sees at most."""
    frozen_per_token: int = 0
    frozen_per_target: int = 0
    """The parts of the first two that are of weights without a gradient."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelFlops | None":
        """Of a dense transformer; None for a model with other weights than vectors and matrices."""
        if any(weight.ndim > 2 for weight in model.parameters()):
            return None
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]
        frozen = [layer for layer in layers if not layer.weight.requires_grad]
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            per_token=2 * sum(layer.weight.numel() for layer in layers),
            per_target=2 * head.weight.numel(),
            per_pair=4 * config.num_attention_heads * head_size,
            windows=_windows(config),
            frozen_per_token=2 * sum(layer.weight.numel() for layer in frozen),
            frozen_per_target=0 if head.weight.requires_grad else 2 * head.weight.numel(),
        )

    def training(self, trees: Sequence[Tree], num_targets: int) -> int:
        """Operations of a forward and backward pass over a packed row."""
        frozen = self.frozen_per_token * _num_tokens(trees) + self.frozen_per_target * num_targets
        return 3 * self.forward(trees, num_targets) - frozen

    def forward(self, trees: Sequence[Tree], num_targets: int) -> int:
        """Operations of a forward pass over a packed row."""
        segments = [(before, before + length) for tree in trees for length, before in tree.segments()]
        pairs = sum(_pairs(end, window) - _pairs(start, window) for window in self.windows for start, end in segments)
        return self.per_token * _num_tokens(trees) + self.per_target * num_targets + self.per_pair * pairs


def utilisation(num_flops: int, busy_s: float, device: torch.device) -> dict[str, float]:
    """`tflops_per_second`, and `mfu`, the share of the device's 16-bit peak, if the table has it."""
    peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    metrics = {"tflops_per_second": num_flops / busy_s / 1e12}
    return metrics if peak is None else metrics | {"mfu": num_flops / busy_s / peak}


def peak_of(device_name: str) -> float | None:
    """Dense 16-bit operations per second of a device, by its name; None if the table does not have it."""
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)


def _num_tokens(trees: Sequence[Tree]) -> int:
    return sum(tree.num_tokens for tree in trees)


def _windows(config: object) -> tuple[int | None, ...]:
    num_layers: int = config.num_hidden_layers  # type: ignore[attr-defined]
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _pairs(length: int, window: int | None) -> int:
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
