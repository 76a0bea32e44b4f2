"""Settings of the prompts: where their records come from, and how they become text."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from darts_async.config.section import Positive, Section, named
from darts_async.extensions import PROMPTS, TASKS

_OF_FILES = ("path", "held_out_path", "prompt_field", "answer_field", "answer_pattern", "metadata_fields")


class FamilyConfig(Section):
    """One family of tasks of the package `reasoning-gym`."""

    name: Annotated[str, Field(min_length=1)]
    """The family, as that package calls it: `chain_sum`, `gcd`, `countdown`."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How often its prompts are drawn, and how many are held out, in proportion to those of the other families."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Settings of the family itself: `{min_terms: 2, max_terms: 3}`. Default: that package's own."""


class PromptsConfig(Section):
    """Where prompts come from. Training and held-out prompts never overlap."""

    source: Annotated[str, named(PROMPTS)] = "darts_async.quickstart.task:prompts"
    """`jsonl`, `parquet`: a file of records. `reasoning_gym`: tasks that the package of this name makes, with its own
    scorer as the reward. Otherwise `module:name`, which is called and gives records; the default is the quickstart's
    arithmetic."""
    families: tuple[FamilyConfig, ...] = Field((), strict=False, max_length=256)
    """For the source `reasoning_gym`: what it makes. Each family gives as many different questions as it has, up to its
    share of `num_train` (1,024, if that is not set)."""
    path: str | None = None
    """File of training records (jsonl, parquet). In every path `~`, `$NAME` and `${NAME}` are filled in, and `$$` is a
    dollar sign."""
    held_out_path: str | None = None
    """File of held-out records. Default: `held_out` records are split off the training file."""
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
    chat_template: bool | str = True
    """Render the prompt with the tokenizer's chat template, if it has one. A text chooses one of several by name."""
    chat_template_arguments: dict[str, Any] = Field(default_factory=dict)
    """Further variables for the chat template: `{enable_thinking: false}`."""
    system_prompt: str | None = None
    """System message before the prompt, when the chat template is used."""
    num_train: Positive | None = None
    """Most training prompts to take. A source that is called gets the number, so that it can generate so many."""
    held_out: Positive = 128
    """Held-out prompts, chosen by the seed."""
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

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_is_a_regular_expression(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _files_have_paths(self) -> Self:
        if self.source in ("jsonl", "parquet") and self.path is None:
            raise ValueError(f"prompts.source is {self.source!r}, which needs prompts.path")
        return self

    @model_validator(mode="after")
    def _families_are_of_their_source(self) -> Self:
        if self.source != TASKS:
            if self.families:
                raise ValueError(f"prompts.families is set, but prompts.source is {self.source!r}; set it to {TASKS!r}")
            return self
        if not self.families:
            raise ValueError(f"prompts.source is {TASKS!r}, which needs prompts.families: `- name: chain_sum`")
        for name in _OF_FILES:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"prompts.{name} is set, but prompts.source {TASKS!r} reads no file; leave it out")
        return self
