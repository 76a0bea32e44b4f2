"""From the settings of a run to a run that evaluates one model, and trains nothing."""

from pathlib import Path

from darts_async.config import LearnerConfig, RunConfig
from darts_async.errors import ConfigError
from darts_async.topology.run_files import CHECKPOINTS_DIR, CONFIG_FILE, MODEL_DIR


def as_evaluation(config: RunConfig, model: str) -> RunConfig:
    """The same run with another model and no steps.

    Args:
        model: as `model.path`, or the directory of a run.

    Raises:
        ConfigError: the run has no model, or the settings evaluate nothing.
    """
    if not config.evaluation.samples_per_prompt:
        raise ConfigError("evaluation.samples_per_prompt is 0, so nothing would be evaluated; set it to 1 or more")
    path = str(_model_of(Path(model))) if (Path(model) / CONFIG_FILE).is_file() else model
    return config.model_copy(
        update=dict(
            name=f"evaluate-{config.name}",
            model=config.model.model_copy(update={"path": path}),
            learner=_without_steps(config.learner),
        )
    )


def _without_steps(learner: LearnerConfig) -> LearnerConfig:
    """Nor with what only steps need: adapters, and the reference model of the divergence."""
    loss = learner.loss.model_copy(update={"kl_weight": 0.0, "reference_path": None})
    return learner.model_copy(update={"steps": 0, "schedule": "constant", "lora": None, "loss": loss})


def _model_of(run_dir: Path) -> Path:
    """What a run has trained: its model, or else its newest checkpoint."""
    if (run_dir / MODEL_DIR).is_dir():
        return (run_dir / MODEL_DIR).absolute()
    found = (run_dir / CHECKPOINTS_DIR).glob("step-*")
    checkpoints = sorted(path for path in found if path.is_dir() and not path.suffix)  # a damaged one has a suffix
    if not checkpoints:
        raise ConfigError(
            f"{run_dir} has no model yet and no checkpoint; wait for its first checkpoint, or name a model"
        )
    return checkpoints[-1].absolute()
