"""Every setting of a run: frozen, typed, unknown keys refused; one docstring per field.

A process reads the resolved file that the launcher wrote; nothing else configures it. Bounds that follow from
settings are properties of `RunConfig`, with their proof, so that no two places can disagree about them.
"""

from darts_async.config.generator import GeneratorConfig, ScriptConfig, VllmConfig
from darts_async.config.learner import LearnerConfig, LoraConfig
from darts_async.config.loss import LossConfig
from darts_async.config.model import ModelConfig, PromptsConfig, SamplingConfig
from darts_async.config.network import NetworkConfig, TransportConfig
from darts_async.config.nodes import NodeConfig, SshConfig
from darts_async.config.restart import BackoffConfig, IntensityConfig, RestartConfig
from darts_async.config.reward import RewardConfig
from darts_async.config.roles import RoleConfig, RolesConfig
from darts_async.config.run import RunConfig
from darts_async.config.shaping import Baseline, PruningConfig, RedundancyConfig, ShapingConfig, StalenessConfig
from darts_async.config.telemetry import EvaluationConfig, TelemetryConfig
from darts_async.config.weights import WeightsConfig

__all__ = [
    "BackoffConfig",
    "Baseline",
    "EvaluationConfig",
    "GeneratorConfig",
    "IntensityConfig",
    "LearnerConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "NetworkConfig",
    "NodeConfig",
    "PromptsConfig",
    "PruningConfig",
    "RedundancyConfig",
    "RestartConfig",
    "RewardConfig",
    "RoleConfig",
    "RolesConfig",
    "RunConfig",
    "SamplingConfig",
    "ScriptConfig",
    "ShapingConfig",
    "SshConfig",
    "StalenessConfig",
    "TelemetryConfig",
    "TransportConfig",
    "VllmConfig",
    "WeightsConfig",
]
