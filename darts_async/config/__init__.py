"""Every setting of a run. Sections are frozen and typed, refuse unknown keys, and have one docstring per field.

A process is configured only by the resolved file that the launcher wrote. A bound that follows from settings is a
property of `RunConfig`, with its proof.
"""

from darts_async.config.generator import GeneratorConfig, ScriptConfig, VllmConfig
from darts_async.config.learner import LearnerConfig, LoraConfig
from darts_async.config.loss import LossConfig
from darts_async.config.model import ModelConfig, SamplingConfig
from darts_async.config.network import NetworkConfig, TransportConfig
from darts_async.config.nodes import NodeConfig, SshConfig
from darts_async.config.prompts import PromptsConfig
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
