"""Creates the trainer of this rank from the settings of a run."""

from pathlib import Path

import structlog
import torch
from transformers import PreTrainedModel

from darts_async.advantage import Decoded
from darts_async.config import RunConfig
from darts_async.learner.lora import add_adapters
from darts_async.learner.model import DTYPES, compile_model, layers_of, load_model
from darts_async.learner.objective import Objective, ScriptedObjective
from darts_async.learner.ranks.rank_group import RankGroup
from darts_async.learner.ranks.rank_info import ALONE, training_device
from darts_async.learner.ranks.sharding import shard_model
from darts_async.learner.step import Trainer
from darts_async.models.length_limits import Lengths
from darts_async.models.location import resolve_model_path
from darts_async.truncation import Truncation

log = structlog.get_logger()


def make_trainer(config: RunConfig, model_dir: Path, ranks: RankGroup | None) -> Trainer:
    """Load the model and make its trainer; blocks. With `ranks`, join them, and keep only this rank's rows.

    Raises:
        ConfigError: adapters are set, but peft is not installed.
        ModelError: there is no such model, or it cannot be trained.
        DeadlineError: some ranks have not come.
    """
    device = training_device()
    rank_info = ranks.rank_info if ranks is not None else ALONE
    torch.manual_seed(config.seed + rank_info.rank)
    model = _load(config, model_dir, ranks, device)
    objective = (Objective if config.learner.script is None else ScriptedObjective)(
        model,
        config.learner,
        temperature=config.sampling.temperature,
        truncation=Truncation(config.sampling.top_k, config.sampling.top_p),
        max_new_tokens=config.sampling.max_new_tokens,
        reference=_load_reference(config, device),
        baseline=config.shaping.baseline,
        decoded=Decoded.of(config.shaping),
        rank_info=rank_info,
    )
    return Trainer(model, config.learner, objective, max_staleness=config.staleness.max_staleness)


def longest(config: RunConfig) -> Lengths:
    """The longest sample, and the longest packed row."""
    sample = config.generator.max_context_tokens
    return Lengths(sample, max(sample, config.learner.tokens_per_micro_batch))


def _load(config: RunConfig, model_dir: Path, ranks: RankGroup | None, device: torch.device) -> PreTrainedModel:
    if ranks is None:
        model = load_model(str(model_dir), dtype=config.model.dtype, lengths=longest(config), device=str(device))
    else:
        model = load_model(str(model_dir), dtype="float32", lengths=longest(config))
    if config.learner.lora is not None:
        add_adapters(model, config.learner.lora, config.seed)
    if config.learner.compile:
        if device.type == "cuda":
            compile_model(model)
        else:
            log.warning("learner_not_compiled", reason="learner.compile is for a GPU, and this process sees none")
    if ranks is not None:
        shard_model(model, layers_of(model), ranks.form(device), DTYPES[config.model.dtype])
    return model


def _load_reference(config: RunConfig, device: torch.device) -> PreTrainedModel | None:
    """The frozen model from which the loss measures the divergence, complete on every rank. None without a divergence,
    or if the reference is the model in training without its adapters."""
    loss = config.learner.loss
    if not loss.kl_weight or (config.learner.lora is not None and loss.reference_path is None):
        return None
    path = resolve_model_path(
        loss.reference_path or config.model.path,
        setting="learner.loss.reference_path" if loss.reference_path else "model.path",
    )
    model = load_model(str(path), dtype=config.model.dtype, lengths=longest(config), device=str(device))
    return model.requires_grad_(False)
