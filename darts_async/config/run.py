"""All sections of a run, and the rules that span several."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from darts_async.config.generator import GeneratorConfig
from darts_async.config.learner import LearnerConfig
from darts_async.config.model import ModelConfig, SamplingConfig
from darts_async.config.network import NetworkConfig, TransportConfig
from darts_async.config.nodes import NodeConfig, Nodes
from darts_async.config.paths import expanded
from darts_async.config.prompts import REST, PromptsConfig, RecordsConfig
from darts_async.config.reward import RewardConfig
from darts_async.config.roles import RolesConfig
from darts_async.config.section import NonNegative, Section
from darts_async.config.shaping import ShapingConfig, StalenessConfig
from darts_async.config.telemetry import EvaluationConfig, TelemetryConfig
from darts_async.config.weights import WeightsConfig
from darts_async.extensions import ENGINE, TASKS
from darts_async.topology.roles import GENERATOR, ROLES

_OF_REWARD = {"function", "functions"}


def _given(values: dict[str, Any], section: str, key: str) -> Any:
    """A setting before its validation, or its default."""
    found = values.get(section, {})
    if isinstance(found, dict):
        return found.get(key, RunConfig.model_fields[section].default.model_dump()[key])
    return getattr(found, key, None)


class RunConfig(Section):
    """One YAML file: the cluster and the run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The run directory is called `NAME-TIME`."""
    seed: NonNegative = 0
    """Seed of prompts, sampling and selection."""
    runs_dir: str = "runs"
    """Directory in which run directories are created."""
    nodes: Nodes = (NodeConfig(name="local"),)
    """The machines. `roles` says which processes run on them."""
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

    @model_validator(mode="before")
    @classmethod
    def _context_is_that_of_a_sample(cls, values: Any) -> Any:
        """Fills in `generator.max_context_tokens`. Values of other types are left to the validation of their fields."""
        if not isinstance(values, dict):
            return values
        generator = values.get(GENERATOR.name, {})
        need = _given(values, "prompts", "max_prompt_tokens"), _given(values, "sampling", "max_new_tokens")
        if not all(isinstance(each, int) for each in need):
            return values
        if isinstance(generator, dict) and "max_context_tokens" not in generator:
            return values | {GENERATOR.name: generator | {"max_context_tokens": sum(need)}}
        if isinstance(generator, GeneratorConfig) and "max_context_tokens" not in generator.model_fields_set:
            return values | {GENERATOR.name: generator.model_copy(update={"max_context_tokens": sum(need)})}
        return values

    @model_validator(mode="before")
    @classmethod
    def _tasks_bring_their_scorer(cls, given: Any) -> Any:
        """`prompts.source: reasoning_gym` needs no setting of the reward."""
        if not isinstance(given, dict) or not isinstance(given.get("prompts"), dict):
            return given
        reward = given.get("reward", {})
        parts = given["prompts"].get("mixture") or [given["prompts"]]
        are_tasks = isinstance(parts, (list, tuple)) and all(
            isinstance(part, dict) and part.get("source") == TASKS for part in parts
        )
        if are_tasks and isinstance(reward, dict) and not _OF_REWARD & reward.keys():
            return given | {"reward": reward | {"function": TASKS}}
        return given

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

    @model_validator(mode="after")
    def _several_rewards_are_those_of_all_prompts(self) -> Self:
        if self.reward.functions and self.own_rewards:
            raise ValueError(
                "reward.functions is set, but some prompts have a reward of their own "
                f"({', '.join(self.own_rewards)}), so the parts of their rewards would be missing: set "
                "reward.function, or leave the others out"
            )
        return self

    @model_validator(mode="after")
    def _sets_of_prompts_have_different_names(self) -> Self:
        owners = {REST: "the single source of a run"}
        for place, name in self._set_names():
            if (owner := owners.get(name)) is not None:
                raise ValueError(
                    f"{place} has the name {name!r} in metrics, which is that of {owner}; name one of them differently"
                )
            owners[name] = place
        return self

    def _set_names(self) -> Iterator[tuple[str, str]]:
        """Of all sets of prompts that have names: (the setting that says it, the name)."""
        prompts = self.prompts
        parts = {f"prompts.mixture.{number}": part.part_names(part.name) for number, part in enumerate(prompts.mixture)}
        sets = {f"evaluation.sets.{number}": (each.name,) for number, each in enumerate(self.evaluation.sets)}
        for place, names in ((parts or {"prompts.families": prompts.part_names()}) | sets).items():
            yield from ((place, name) for name in names if name)

    @model_validator(mode="after")
    def _token_staleness_masks_something(self) -> Self:
        tokens, samples = self.learner.loss.max_token_staleness, self.staleness.max_staleness
        if tokens is not None and tokens >= samples:
            raise ValueError(
                f"learner.loss.max_token_staleness is {tokens}, but staleness.max_staleness is {samples}, so no token "
                "is ever older; lower the first or remove it"
            )
        return self

    @model_validator(mode="after")
    def _overlong_buffer_is_part_of_a_response(self) -> Self:
        buffer, cap = self.learner.loss.overlong_buffer_tokens, self.sampling.max_new_tokens
        if buffer >= cap:
            raise ValueError(
                f"learner.loss.overlong_buffer_tokens ({buffer}) is not below sampling.max_new_tokens ({cap}), so "
                "every response would be penalised; lower it"
            )
        return self

    @model_validator(mode="after")
    def _roles_are_on_nodes_of_the_run(self) -> Self:
        names = [node.name for node in self.nodes]
        for role in ROLES:
            for name in self.roles.of(role).nodes:
                if name not in names:
                    raise ValueError(f"roles.{role}.nodes names {name!r}, but the nodes are {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _the_engine_has_text_to_stop_at(self) -> Self:
        if self.sampling.stop and not self.generator.capabilities.has_model:
            raise ValueError(
                f"sampling.stop is {list(self.sampling.stop)}, but generator.engine {self.generator.engine} generates "
                "lengths and no text: leave it out, or choose another engine"
            )
        return self

    @model_validator(mode="after")
    def _the_engine_has_the_devices_that_it_drives(self) -> Self:
        engine, devices = self.generator.engine, self.roles.generator.devices
        if self.generator.capabilities.has_workers:
            size = self.generator.vllm.tensor_parallel_size
            if size != max(devices, 1):
                raise ValueError(
                    f"generator.vllm.tensor_parallel_size is {size}, but roles.generator.devices is {devices}: a "
                    "generator shards its model over all its devices, or runs on CPUs without any; set both alike"
                )
        elif devices and engine in ENGINE.built_in:
            raise ValueError(
                f"roles.generator.devices is {devices}, but generator.engine {engine} decodes on CPUs; leave it out, "
                "or choose vllm"
            )
        return self

    @model_validator(mode="after")
    def _no_model_decodes_for_a_scripted_learner(self) -> Self:
        if self.learner.script is not None and self.generator.capabilities.has_model:
            raise ValueError(
                f"learner.script is set, so nothing would be trained, but generator.engine {self.generator.engine} "
                "decodes with a model: leave the script out, or choose the scripted engine"
            )
        return self

    @model_validator(mode="after")
    def _the_engine_can_do_it(self) -> Self:
        engine = self.generator.engine  # a generator asks one of yours, which is not imported here
        reason = self.generator.capabilities.why_not(engine, self.weights, self.sampling.temperature)
        if engine in ENGINE.built_in and reason is not None:
            raise ValueError(reason)
        return self

    @property
    def record_sections(self) -> dict[str, RecordsConfig]:
        """Where the records of prompts come from, each by the setting that says it."""
        sets = {f"evaluation.sets.{place}": each for place, each in enumerate(self.evaluation.sets)}
        return self.prompts.sections | sets

    @property
    def own_rewards(self) -> tuple[str, ...]:
        """The reward functions beside that of the section `reward`, each of some prompts alone."""
        own = {part.own_reward for part in (*self.prompts.mixture, *self.evaluation.sets)}
        return tuple(sorted(own - {None, self.reward.function}, key=str))  # type: ignore[arg-type]

    @property
    def runs_path(self) -> Path:
        """`runs_dir` with `~` and variables filled in. Raises `ConfigError` if one is not set."""
        return expanded(self.runs_dir, "runs_dir").absolute()

    def host_of(self, node: NodeConfig) -> str:
        """The address that processes on a node listen at."""
        return self.network.host if node.host is None else node.host

    @property
    def max_open_groups(self) -> int:
        """Most groups that are admitted and not yet in a committed step: `B * (max_staleness + 1)`. Proof: group number
        n (dropped groups do not count) is admitted only while `n < B * (v + max_staleness + 1)`, where v is the lowest
        version of a routable generator. v is at most the number of committed steps, which used `B * v` groups."""
        return self.learner.groups_per_step * (self.staleness.max_staleness + 1)
