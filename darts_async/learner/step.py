"""One optimiser step, to which groups are added as they arrive: the streamed gradient equals the batch gradient.

The forward and backward passes of groups run when they arrive and add to unnormalised sums of gradients. `finish_step`
divides them once by the denominator of the whole step. Up to rounding, sums do not depend on the order or on the split
into micro-batches or over ranks.

Invariants. Between steps all gradients are zero. A token older than `max_staleness` never reaches the forward pass.
`policy_version` counts finished steps, including those whose loss or gradient was not finite: such a step leaves
parameters and moments untouched, on all ranks alike.

Weights of less than 32 bits have a float32 master copy for sums and updates: at a rate of 1e-6 an update is below half
a unit in the last place of bfloat16 and would be lost. A sharded model (see `sharding`) holds float32 shards, which are
masters themselves; the state is then that of this rank's rows. If the model has adapters (see `lora`), only they are
trained, and the state is theirs.
"""

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from darts_async.config import LearnerConfig
from darts_async.errors import StalenessError
from darts_async.learner.lora import Adapters
from darts_async.learner.lr_schedule import learning_rate
from darts_async.learner.metric_sums import Tally
from darts_async.learner.objective import Objective
from darts_async.learner.ranks.sharding import drop_gathered, local_rows, whole
from darts_async.protocol import TrainGroup
from darts_async.weights.sending.source import LiveTensors, WeightSource


class Trainer:
    """Model, optimiser and the step that is being summed up. Synchronous; one thread at a time."""

    def __init__(
        self, model: PreTrainedModel, config: LearnerConfig, objective: Objective, *, max_staleness: int
    ) -> None:
        self.model = model
        self.policy_version = 0
        self.num_skipped_in_a_row = 0
        self.rank_info = objective.rank_info
        self._config = config
        self._objective = objective
        self._max_staleness = max_staleness
        self._adapters = Adapters.of(model, objective.rank_info)
        self._merged = None if self._adapters is None else self._adapters.merged()
        weights = model.named_parameters()
        self._weights = {name: weight for name, weight in weights if self._adapters is None or weight.requires_grad}
        self._masters = {name: _master(weight) for name, weight in self._weights.items()}
        self._optimiser = torch.optim.AdamW(
            self._masters.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self._num_skipped_steps = 0
        self._open_step()

    # --- a step ----------------------------------------------------------------------------------------------

    def add_groups(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Add the gradient of groups (this rank's samples of them) to the step, in as few passes as possible; returns
        their metrics. Raises `StalenessError`, before anything is added, if a token is older than `max_staleness`."""
        started_s = time.perf_counter()
        for group in groups:
            assert group.step == self.policy_version, f"group of step {group.step} at version {self.policy_version}"
            _check_staleness(group, self._max_staleness)
        tally = self._objective.backward(groups, self._collect_gradients)
        self.tally.merge(tally)
        self._num_groups += len(groups)
        self._num_tokens += sum(len(group.token_ids) for group in groups)
        self._denominator += sum(self._objective.denominator(group) for group in groups)
        self._busy_s += time.perf_counter() - started_s
        return tally.as_floats()

    def finish_step(self) -> dict[str, float]:
        """Update the parameters with the mean gradient; returns the metrics of the step. A collective of all ranks. For
        metrics of all ranks, merge the tallies of the others into `tally` before."""
        started_s = time.perf_counter()
        assert self._num_groups, "a step is finished after at least one group"
        rate = learning_rate(self._config, self.policy_version)
        grad_norm = self._mean_gradient()
        if math.isfinite(grad_norm):
            self.num_skipped_in_a_row = 0
            self._update(rate)
        else:
            self._num_skipped_steps += 1
            self.num_skipped_in_a_row += 1
        busy_s = self._busy_s + time.perf_counter() - started_s
        metrics = self.tally.as_floats() | {
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "skipped_steps": float(self._num_skipped_steps),
            "tokens": float(self._num_tokens),
            "tokens_per_second": self._num_tokens / busy_s,
            **self._objective.take_utilisation(busy_s),
        }
        self.policy_version += 1
        self._open_step()
        return metrics

    # --- state -----------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on besides `policy_version`, without a copy: float32 weights and
        moments of this rank's rows, and counts."""
        num_updates = next(iter(self._optimiser.state.values()), {"step": 0})["step"]
        counts = [int(num_updates), self._num_skipped_steps, self.num_skipped_in_a_row]
        tensors = {"counts": torch.tensor(counts)}
        for name, master in self._masters.items():
            state = self._optimiser.state.get(master, {})
            tensors[f"weight.{name}"] = local_rows(master.detach())
            for moment in ("exp_avg", "exp_avg_sq"):
                value = state[moment] if moment in state else torch.zeros_like(master)
                tensors[f"{moment}.{name}"] = local_rows(value.detach())
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor], policy_version: int) -> None:
        """Continue from `state_tensors` of the same model and the same rows, at the beginning of a step."""
        num_updates, self._num_skipped_steps, self.num_skipped_in_a_row = tensors["counts"].tolist()
        for name, master in self._masters.items():
            local_rows(master).copy_(tensors[f"weight.{name}"])
            moments = {moment: torch.zeros_like(master) for moment in ("exp_avg", "exp_avg_sq")}
            for moment, value in moments.items():
                local_rows(value).copy_(tensors[f"{moment}.{name}"])
            self._optimiser.state[master] = {"step": torch.tensor(float(num_updates)), **moments}
        self.policy_version = policy_version
        self._publish_masters()
        self._open_step()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each trained parameter with the rows of all ranks."""
        return {name: tuple(weight.shape) for name, weight in self._weights.items()}

    # --- what others use -------------------------------------------------------------------------------------

    @property
    def has_adapters(self) -> bool:
        """Whether `rows` are not the trained parameters. No later step changes their memory then."""
        return self._merged is not None

    def rows(self) -> Mapping[str, Tensor]:
        """This rank's rows of every weight of the model, adapters merged, without a copy. They are not looked up in the
        module: during a pass a sharded model has gathered parameters there."""
        if self._merged is not None:
            return self._merged
        return {name: local_rows(weight.detach()) for name, weight in self._weights.items()}

    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight in `rows` with the rows of all ranks."""
        return self.shapes() if self._merged is None else self._merged.shapes

    def source(self) -> WeightSource:
        """The weights of this version, if one rank has them all."""
        return LiveTensors(self.rows().items()) if self._merged is None else self._merged

    # --- inside ----------------------------------------------------------------------------------------------

    def _open_step(self) -> None:
        # Zeros, not None: AdamW leaves a parameter without gradient out, momentum and decay included.
        for master in self._masters.values():
            master.grad = torch.zeros_like(master)
        self.tally = Tally()
        self._num_groups = 0
        self._num_tokens = 0
        self._denominator = 0.0
        self._busy_s = 0.0

    def _collect_gradients(self) -> None:
        for name, weight in self._weights.items():
            master = self._masters[name]
            if master is not weight and weight.grad is not None:
                assert master.grad is not None
                master.grad.add_(weight.grad)
                weight.grad = None

    def _mean_gradient(self) -> float:
        """Divide by the denominator and clip; returns the norm before clipping, over all ranks.

        A loss that is not finite makes the gradient NaN, and through the norm all ranks see it. A step without a
        trained token has a sum and a denominator of zero.
        """
        divisor = self._denominator or 1.0
        if not math.isfinite(self.tally.sums.get("loss", 0.0)):
            divisor = math.nan
        for master in self._masters.values():
            assert master.grad is not None
            master.grad.div_(divisor)
        return whole(nn.utils.clip_grad_norm_(self._masters.values(), self._config.max_grad_norm)).item()

    def _update(self, rate: float) -> None:
        self._objective.before_update()
        for param_group in self._optimiser.param_groups:
            param_group["lr"] = rate
        self._optimiser.step()
        self._publish_masters()

    @torch.no_grad()
    def _publish_masters(self) -> None:
        drop_gathered(self.model)
        for name, weight in self._weights.items():
            if self._masters[name] is not weight:
                weight.copy_(self._masters[name])
        if self._adapters is not None:
            self._merged = self._adapters.merged()


def _master(weight: nn.Parameter) -> Tensor:
    """The weight itself if it is float32, else a float32 copy."""
    if weight.dtype == torch.float32:
        return weight
    return weight.detach().float().requires_grad_()


def _check_staleness(group: TrainGroup, max_staleness: int) -> None:
    oldest = int(group.versions.min(initial=group.step))
    if group.step - oldest > max_staleness:
        raise StalenessError(
            f"group {group.group_id} has a token of version {oldest} at step {group.step}: staleness "
            f"{group.step - oldest}, but staleness.max_staleness is {max_staleness}"
        )
