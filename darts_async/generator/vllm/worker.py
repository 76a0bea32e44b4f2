"""The code that runs inside vLLM's worker processes. vLLM imports it there as the worker extension.

An import has two effects, which are wanted only in a worker. The process dies with the one that started it: otherwise
kill -9 of a generator would leave its engine core running forever. And vLLM knows the weight transfer backend
`BACKEND`.

The weights of an update arrive through a `WorkerLink`. Staged weights are beside the running model, and are loaded from
memory between two steps, in one call of vLLM's start, update and finish. So no failure of the network leaves the model
half loaded. A direct update loads tensors as they arrive. One that breaks leaves a complete model with mixed weights,
which must not decode until another update is complete.
"""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from darts_async.errors import WeightUpdateError
from darts_async.generator.vllm.worker_link import WorkerLink
from darts_async.machine.lifetime import die_with_parent
from darts_async.weights.receiving.staging import Staging

BACKEND = "darts"


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the generator listens, the local address for the collective's sockets, and how weights are received."""

    socket_path: str
    interface: str
    is_direct: bool


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The version to load."""

    policy_version: int


class LinkedWeights(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """vLLM's interface to the link."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _link: WorkerLink | None = None
    _is_direct = False
    _staging: Staging | None = None  # while its tensors are being loaded

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect to the generator."""
        number = self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank
        path, self._is_direct = Path(init_info.socket_path), init_info.is_direct
        self._link = WorkerLink(
            path, number, init_info.interface, self.device, is_direct=init_info.is_direct, lost=_die
        )
        self._link.open()

    def start_weight_update(self) -> None:
        """Begin to fill layers as their weights come, and to rebuild them as the kernels need them. CPUs need this too,
        because the weights in the form in which they were loaded no longer exist."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load a version. (vLLM's own method synchronizes an accelerator even without one.)"""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Copy staged or arriving tensors into the model. Raises `WeightUpdateError`."""
        assert self._link is not None, "it was connected"
        if self._is_direct:
            self.model.load_weights(self._arriving(update_info.policy_version))
        else:
            self._staging = self._link.staged(update_info.policy_version)
            self.model.load_weights(iter(self._staging.tensors.items()))

    def finish_weight_update(self) -> None:
        """Complete the model again."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            _repack_tied_heads(self.model)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the next update writes into the memory that was read
        if self._link is not None and self._staging is not None:
            self._link.give_back(self._staging)
        self._staging = None

    def shutdown(self) -> None:
        """Close the link."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _arriving(self, policy_version: int) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._link is not None
        for name, tensor in self._link.stream(policy_version).tensors():
            if tensor.is_cuda:  # made by the receiving thread on its stream, read on this one
                tensor.record_stream(torch.cuda.current_stream())
            yield name, tensor


class WorkerExtension:
    """Methods that the generator can call on a worker."""

    def darts_connect(self, init_info: dict[str, Any]) -> None:
        """Open the link."""
        _worker(self).init_weight_transfer_engine(init_info)

    def darts_use(self, policy_version: int) -> None:
        """Load the version that was committed, between two steps."""
        worker = _worker(self)
        worker.start_weight_update()
        worker.update_weights({"policy_version": policy_version})
        worker.finish_weight_update()

    def darts_receive(self, policy_version: int) -> str | None:
        """Load the version that was offered, as it arrives; returns why that failed."""
        worker = _worker(self)
        worker.start_weight_update()
        try:
            worker.update_weights({"policy_version": policy_version})
        except WeightUpdateError as error:
            with set_current_vllm_config(worker.vllm_config):
                worker.weight_transfer_engine.finish_weight_update()  # so that the next update finds a complete model
            return str(error)
        worker.finish_weight_update()
        return None


def _worker(extension: WorkerExtension) -> Any:
    """vLLM makes the extension a base class of its worker."""
    return extension


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """vLLM 0.32 on CPUs keeps a packed copy of the output layer. If that shares its weight with the embedding, a reload
    only updates the embedding, so the copy is made again."""
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def _die() -> None:
    """The generator has ended, so decoding has no use."""
    os.kill(os.getpid(), signal.SIGKILL)


die_with_parent()
WeightTransferEngineFactory.register_engine(BACKEND, LinkedWeights)
