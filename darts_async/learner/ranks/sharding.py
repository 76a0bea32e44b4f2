"""Shards the parameters of a model over ranks with FSDP2, and finds the rows of this rank.

Every layer is a unit: its parameters are gathered before its pass and released after it; embeddings and head stay
gathered from the forward to the backward pass. Shards are float32, the masters of the optimiser; passes run in
`compute_dtype`, to which FSDP casts what it gathers, and gradients are added up in float32. They are summed over ranks,
not averaged: `Trainer` divides once per step.

Invariant. All ranks make the same passes in the same order, because every pass is a collective of all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from darts_async.errors import ModelError


def shard_model(
    model: PreTrainedModel, layers: Sequence[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype
) -> None:
    """Spread a float32 model over the ranks of a mesh, in place, and move it to their device layer by layer.

    Raises `ModelError` if the model has not said what its layers are.
    """
    if not layers:
        raise ModelError(f"{type(model).__name__} names no layers (_no_split_modules), by which it could be sharded")
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            module.set_gradient_divide_factor(1.0)
    register_fsdp_forward_method(model, "packed_logprobs")


def drop_gathered(model: nn.Module) -> None:
    """Make the next pass gather everything again: parameters that a forward pass without a backward pass has left
    gathered would hide an update of the shards."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local_rows(tensor: Tensor) -> Tensor:
    """This rank's rows of a parameter or a moment, without a copy; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all ranks; a collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
