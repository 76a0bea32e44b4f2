"""Settings of the prompts: where their records come from, and how they become text."""

import re
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from darts_async.config.section import Fraction, Positive, Section, named
from darts_async.extensions import HUB, PROMPTS, REWARD, TASKS

_SOURCE_BY_ENDING = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_OF_RECORDS = ("prompt_field", "answer_field", "answer_pattern", "metadata_fields")
_INSTEAD = {HUB: " (held_out_split is there)"}
REST = "prompts"
"""The set, in metrics, of the prompts of a single source without a name. No other set has this name."""
_OF_HUB = ("subset", "split", "held_out_split", "revision")


class FamilyConfig(Section):
    """One family of tasks of the package `reasoning-gym`."""

    name: Annotated[str, Field(min_length=1)]
    """The family, as that package calls it: `chain_sum`, `gcd`, `countdown`."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How often its prompts are drawn, and how many are held out, in proportion to those of the other families."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Settings of the family itself: `{min_terms: 2, max_terms: 3}`. Default: that package's own."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class RecordsConfig(Section):
    """Where records come from."""

    _prefix: ClassVar[str] = ""
    """What messages put before the name of a setting."""

    source: Annotated[str, named(PROMPTS)] = "darts_async.quickstart.task:prompts"
    """`jsonl`, `parquet`: a file of records. `hub`: a data set of the Hugging Face hub. `reasoning_gym`: tasks that the
    package of this name makes, with its own scorer as the reward. Otherwise `module:name`, which is called and gives
    records. Default: what the ending of `path` says, or without a path the quickstart's arithmetic."""
    families: tuple[FamilyConfig, ...] = Field((), strict=False, max_length=256)
    """For the source `reasoning_gym`: what it makes. Each family gives as many different questions as it has, up to its
    share of `num_train` (1,024, if that is not set)."""
    path: str | None = None
    """File of training records (jsonl, parquet), or the data set: its id on the hub, or a directory with a copy of it.
    In every path `~`, `$NAME` and `${NAME}` are filled in, and `$$` is a dollar sign."""
    held_out_path: str | None = None
    """File of held-out records. Default: `held_out` records are split off the training file."""
    subset: str | None = None
    """`hub`: which subset (also called configuration) of the data set, if it has several."""
    split: str | None = None
    """`hub`: the split to train on. Default: `train`."""
    held_out_split: str | None = None
    """`hub`: the split to hold records out of. Default: they are split off the one to train on."""
    revision: str | None = None
    """`hub`: branch, tag or commit. A run keeps the commit that it begins with. Name one to get the same records in
    another run."""
    prompt_field: str = "prompt"
    """Field that holds the prompt: a text, or a list of {role, content} messages."""
    answer_field: str = "answer"
    """Field that holds the reference answer. Dots reach into nested fields: `reward_model.ground_truth`."""
    answer_pattern: str | None = None
    """Regular expression that finds the answer in that field: its first group, or the complete match if it has no
    group. A record without a match is an error."""
    metadata_fields: tuple[str, ...] | None = Field(None, strict=False)
    """Fields that the reward function gets as `metadata`, as they are in the record. Dots reach into nested fields.
    Default: all but prompt and answer. Other fields are not checked, and are not read from a parquet file."""
    num_train: Positive | None = None
    """Most training prompts to take. A source that is called gets the number, so that it can generate so many."""
    held_out: Positive = 128
    """Held-out prompts, chosen by the seed."""

    @model_validator(mode="before")
    @classmethod
    def _source_is_that_of_the_path(cls, values: Any) -> Any:
        path = values.get("path") if isinstance(values, dict) else None
        if not isinstance(path, str) or "source" in values:
            return values
        source = _SOURCE_BY_ENDING.get(PurePath(path).suffix)
        if source is None:
            where = cls._prefix
            raise ValueError(f"{where}path is {path!r}, whose ending does not tell what it is; set {where}source")
        return values | {"source": source}

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_is_a_regular_expression(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _the_source_has_what_it_needs(self) -> Self:
        prefix, source = self._prefix, self.source
        if source in ("jsonl", "parquet", HUB) and self.path is None:
            raise ValueError(f"{prefix}source is {source!r}, which needs {prefix}path")
        if source == TASKS and not self.families:
            raise ValueError(f"{prefix}source is {source!r}, which needs {prefix}families: `- name: chain_sum`")
        of_tasks, of_hub = f"which is of the source {TASKS!r}", f"which is of the source {HUB!r}"
        unused = {
            "families": source != TASKS and of_tasks,
            **dict.fromkeys(_OF_HUB, source != HUB and of_hub),
            **dict.fromkeys(_OF_RECORDS, source == TASKS and "but tasks are made, and no records are read"),
            "path": source == TASKS and "but tasks are made, and no file is read",
            "held_out_path": source in (TASKS, HUB) and f"but that reads no such file{_INSTEAD.get(source, '')}",
        }
        for name, why in unused.items():
            if why and self.differs(name):
                raise ValueError(f"{prefix}source is {source!r}, and {prefix}{name} is set, {why}; leave it out")
        return self

    def part_names(self, name: str = "") -> tuple[str, ...]:
        """The names in metrics of what these records become: one part, which has this name, or one for each family of
        tasks; empty for a single part without a name."""
        if self.source != TASKS:
            return (name,)
        families = [family.name for family in self.families]
        own = (each if families.count(each) == 1 else f"{each}.{place}" for place, each in enumerate(families))
        return tuple(f"{name}.{each}" if name else each for each in own)

    def differs(self, name: str) -> bool:
        """Whether a setting has another value than its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True))


class NamedRecordsConfig(RecordsConfig):
    """One of several places where records come from."""

    name: Name
    """Its name in metrics."""
    reward: Annotated[str, Field(max_length=1_000), named(REWARD)] | None = None
    """Reward function of these prompts alone, which has workers of its own: `math`, `exact_match`, `module:name`.
    Default: for tasks of `reasoning_gym` their own scorer, else the section `reward`."""

    @property
    def own_reward(self) -> str | None:
        """The reward function of these prompts alone; None if it is that of the section `reward`."""
        return self.reward or (TASKS if self.source == TASKS else None)


class MixturePartConfig(NamedRecordsConfig):
    """One of several sources that prompts are drawn from."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How often its prompts are drawn, in proportion to those of the other parts. How many records it has does not
    matter."""


class EvaluationSetConfig(NamedRecordsConfig):
    """A set of prompts that is only evaluated on: `held_out` of its records, or of its held-out ones, if it has any."""


class CurriculumConfig(Section):
    """Which prompts are passed over for what their earlier samples got: a group whose rewards are all equal teaches
    nothing. The measure is a prompt's mean reward, each clipped to 0 to 1, in which earlier visits count less."""

    lowest: Fraction = 0.05
    """A prompt whose mean reward is lower is passed over."""
    highest: Fraction = 0.95
    """A prompt whose mean reward is higher is passed over."""
    revisit_share: Annotated[float, Field(ge=0.01, le=1)] = 0.1
    """Share of such prompts that are asked all the same, chosen by the seed: the model changes."""

    @model_validator(mode="after")
    def _some_are_inside_and_some_outside(self) -> Self:
        if self.lowest == 0.0 and self.highest == 1.0:
            raise ValueError(
                "prompts.curriculum passes over nothing with lowest 0 and highest 1; leave one of them "
                "at its default, or leave the curriculum out"
            )
        if self.lowest > self.highest:
            raise ValueError(
                f"prompts.curriculum.lowest is {self.lowest:g}, but highest is {self.highest:g}; swap them"
            )
        return self


class PromptsConfig(RecordsConfig):
    """Where prompts come from. Training and held-out prompts never overlap."""

    _prefix: ClassVar[str] = "prompts."

    mixture: tuple[MixturePartConfig, ...] = Field((), strict=False, max_length=256)
    """Several sources in place of one, each with a `name`, a `weight` and the settings above."""
    curriculum: CurriculumConfig | None = None
    """Pass over prompts that are too hard or too easy by now. Default: every prompt is asked in its turn."""
    chat_template: bool | str = True
    """Render the prompt with the tokenizer's chat template, if it has one. A text chooses one of several by name."""
    chat_template_arguments: dict[str, Any] = Field(default_factory=dict)
    """Further variables for the chat template: `{enable_thinking: false}`."""
    system_prompt: str | None = None
    """System message before the prompt, when the chat template is used."""
    max_prompt_tokens: Positive = 512
    """Longer prompts are refused when the data set is loaded."""
    on_too_long: Literal["error", "skip"] = "error"
    """What to do with a prompt longer than `max_prompt_tokens`."""

    @field_validator("chat_template_arguments")
    @classmethod
    def _arguments_are_not_those_of_the_run(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted({"messages", "add_generation_prompt"} & set(arguments)):
            raise ValueError(f"the run itself gives {taken[0]} to the template; leave it out")
        return arguments

    @model_validator(mode="after")
    def _a_mixture_is_all_there_is(self) -> Self:
        if not self.mixture:
            return self
        for name in RecordsConfig.model_fields:
            if self.differs(name):
                raise ValueError(f"prompts.{name} is set, but so is prompts.mixture; move it into a part of that")
        return self

    @property
    def sections(self) -> dict[str, RecordsConfig]:
        """Where the records come from, each by the setting that says it."""
        if not self.mixture:
            return {"prompts": self}
        return {f"prompts.mixture.{place}": part for place, part in enumerate(self.mixture)}
