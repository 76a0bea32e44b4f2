"""All sections of a run, and the rules that span several."""

from typing import Self

from pydantic import Field, model_validator

from darts_async.config.generator import GeneratorConfig
from darts_async.config.learner import LearnerConfig
from darts_async.config.model import ModelConfig, PromptsConfig, SamplingConfig
from darts_async.config.network import NetworkConfig, TransportConfig
from darts_async.config.reward import RewardConfig
from darts_async.config.roles import RolesConfig
from darts_async.config.section import NonNegative, Section
from darts_async.config.shaping import ShapingConfig, StalenessConfig
from darts_async.config.telemetry import EvaluationConfig, TelemetryConfig
from darts_async.config.weights import WeightsConfig


class RunConfig(Section):
    """One YAML file: the cluster and the run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Part of the run directory's name."""
    seed: NonNegative = 0
    """Seeds prompts, sampling and selection."""
    runs_dir: str = "runs"
    """A directory `NAME-TIME` is made in it."""
    network: NetworkConfig = NetworkConfig()
    transport: TransportConfig = TransportConfig()
    roles: RolesConfig = RolesConfig()
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    sampling: SamplingConfig = SamplingConfig()
    shaping: ShapingConfig = ShapingConfig()
    staleness: StalenessConfig = StalenessConfig()
    generator: GeneratorConfig = GeneratorConfig()
    reward: RewardConfig = RewardConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _context_holds_a_sample(self) -> Self:
        need = self.prompts.max_prompt_tokens + self.sampling.max_new_tokens
        if need > self.generator.max_context_tokens:
            raise ValueError(
                f"prompts.max_prompt_tokens ({self.prompts.max_prompt_tokens}) + sampling.max_new_tokens "
                f"({self.sampling.max_new_tokens}) is {need}, but generator.max_context_tokens is "
                f"{self.generator.max_context_tokens}"
            )
        return self

    @property
    def max_open_groups(self) -> int:
        """Groups admitted and not yet in a taken step, at most: `B * (max_staleness + 1)`.

        Proof: group number n (counted without dropped ones) is admitted only while
        `n < B * (v + max_staleness + 1)`, where v is the lowest version of a routable generator, and v is at
        most the number of steps taken, whose groups are `B * v`.
        """
        return self.learner.groups_per_step * (self.staleness.max_staleness + 1)
