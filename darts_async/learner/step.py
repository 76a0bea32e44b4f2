"""One optimiser step, fed group by group: streamed gradient = batch gradient.

A group's forward and backward pass run when it arrives and add to unnormalised sums of gradients. `finish_step`
divides them once by the number of trained tokens of the whole step. Sums do not depend on the order or on the split
into micro-batches (up to rounding), so it does not matter when a group came.

Invariants. Between steps all gradients are zero. A token older than `max_staleness` never reaches the forward
pass. `policy_version` counts finished steps, including those whose gradient was not finite: such a step leaves
parameters and moments untouched.

Weights of less than 32 bits have a float32 master copy for sums and updates: at a rate of 1e-6 an update is
below half a unit in the last place of bfloat16 and would be lost.
"""

import time

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from darts_async.config import Baseline, LearnerConfig
from darts_async.errors import StalenessError
from darts_async.learner.objective import Objective
from darts_async.learner.tally import Tally
from darts_async.protocol import TrainGroup


class Trainer:
    """Model, optimiser and the step that is being summed up. Synchronous; one thread at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: LearnerConfig,
        *,
        temperature: float,
        max_staleness: int,
        baseline: Baseline = "group",
        policy_version: int = 0,
    ) -> None:
        self.model = model
        self.policy_version = policy_version
        self._config = config
        self._objective = Objective(model, config, temperature=temperature, baseline=baseline)
        self._max_staleness = max_staleness
        self._weights: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._masters = {name: _master(weight) for name, weight in self._weights.items()}
        self._optimiser = torch.optim.AdamW(
            self._masters.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self._num_skipped_steps = 0
        self._open_step()

    def add_group(self, group: TrainGroup) -> dict[str, float]:
        """Add the group's gradient to the step, and return its metrics.

        Raises `StalenessError`, before anything is added, if a token is older than `max_staleness`.
        """
        started_s = time.perf_counter()
        assert group.step == self.policy_version, f"group of step {group.step} at version {self.policy_version}"
        _check_staleness(group, self._max_staleness)
        tally = self._objective.backward(group, self._collect_gradients)
        self._tally.merge(tally)
        self._num_tokens += len(group.token_ids)
        self._busy_s += time.perf_counter() - started_s
        return tally.as_floats()

    def finish_step(self) -> dict[str, float]:
        """Update the parameters with the mean gradient per token, and return the metrics of the step."""
        started_s = time.perf_counter()
        assert self._num_tokens, "a step is finished after at least one group"
        rate = self._config.learning_rate * _warmup(self.policy_version, self._config.warmup_steps)
        grad_norm = self._mean_gradient()
        if grad_norm.isfinite():
            self._update(rate)
        else:
            self._num_skipped_steps += 1
        busy_s = self._busy_s + time.perf_counter() - started_s
        metrics = self._tally.as_floats() | {
            "grad_norm": grad_norm.item(),
            "learning_rate": rate,
            "skipped_steps": float(self._num_skipped_steps),
            "tokens": float(self._num_tokens),
            "tokens_per_second": self._num_tokens / busy_s,
        }
        self.policy_version += 1
        self._open_step()
        return metrics

    def state_tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on besides `policy_version`: float32 weights, moments, update count."""
        tensors = {"num_updates": torch.tensor(self._num_updates())}
        for name, master in self._masters.items():
            state = self._optimiser.state.get(master, {})
            tensors[f"weight.{name}"] = master.detach()
            tensors[f"exp_avg.{name}"] = state.get("exp_avg", torch.zeros_like(master)).detach()
            tensors[f"exp_avg_sq.{name}"] = state.get("exp_avg_sq", torch.zeros_like(master)).detach()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor], policy_version: int) -> None:
        """Continue from `state_tensors` of the same model, at the beginning of a step."""
        num_updates = tensors["num_updates"].float()
        for name, master in self._masters.items():
            master.copy_(tensors[f"weight.{name}"])
            moments = {key: tensors[f"{key}.{name}"].to(master.device) for key in ("exp_avg", "exp_avg_sq")}
            self._optimiser.state[master] = {"step": num_updates.clone(), **moments}
        self.policy_version = policy_version
        self._publish_masters()
        self._open_step()

    def _open_step(self) -> None:
        # Zeros, not None: AdamW leaves a parameter without gradient out, momentum and decay included.
        for master in self._masters.values():
            master.grad = torch.zeros_like(master)
        self._tally = Tally()
        self._num_tokens = 0
        self._busy_s = 0.0

    def _collect_gradients(self) -> None:
        for name, weight in self._weights.items():
            master = self._masters[name]
            if master is not weight and weight.grad is not None:
                assert master.grad is not None
                master.grad.add_(weight.grad)
                weight.grad = None

    def _mean_gradient(self) -> Tensor:
        """Divide by the tokens and clip; returns the norm before clipping."""
        for master in self._masters.values():
            assert master.grad is not None
            master.grad.div_(self._num_tokens)
        return nn.utils.clip_grad_norm_(self._masters.values(), self._config.max_grad_norm)

    def _update(self, rate: float) -> None:
        for param_group in self._optimiser.param_groups:
            param_group["lr"] = rate
        self._optimiser.step()
        self._publish_masters()

    @torch.no_grad()
    def _publish_masters(self) -> None:
        for name, weight in self._weights.items():
            if self._masters[name] is not weight:
                weight.copy_(self._masters[name])

    def _num_updates(self) -> int:
        states = iter(self._optimiser.state.values())
        return int(next(states, {"step": 0})["step"])


def _master(weight: nn.Parameter) -> Tensor:
    """The weight itself if it is float32, else a float32 copy."""
    if weight.dtype == torch.float32:
        return weight
    return weight.detach().float().requires_grad_()


def _warmup(num_steps_done: int, warmup_steps: int) -> float:
    """Share of the peak rate: rises linearly and is 1 from step number `warmup_steps` on."""
    return min(1.0, (num_steps_done + 1) / max(1, warmup_steps))


def _check_staleness(group: TrainGroup, max_staleness: int) -> None:
    oldest = int(group.versions.min(initial=group.step))
    if group.step - oldest > max_staleness:
        raise StalenessError(
            f"group {group.group_id} has a token of version {oldest} at step {group.step}: staleness "
            f"{group.step - oldest}, but staleness.max_staleness is {max_staleness}"
        )
