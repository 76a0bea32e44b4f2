"""Settings of the language model, the prompts and the sampling of tokens."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from darts_async.config.section import NonNegative, Positive, Section, named
from darts_async.extensions import PROMPTS


class ModelConfig(Section):
    """The language model that is trained."""

    path: str = "darts_async.quickstart:model"
    """A directory in Hugging Face format, a hub id, or `package:directory` for one in an installed package: the default
    is the small model that is shipped."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights in the learner and the generators."""

    @field_validator("path")
    @classmethod
    def _path_has_its_present_name(cls, path: str) -> str:
        if path == "quickstart":
            raise ValueError("model.path 'quickstart' is now called 'darts_async.quickstart:model'; write that")
        return path


class PromptsConfig(Section):
    """Where prompts come from. Training and held-out prompts never overlap."""

    source: Annotated[str, named(PROMPTS)] = "darts_async.quickstart.task:prompts"
    """`jsonl`, `parquet`: a file of records. Otherwise `module:name`, which is called and gives records; the default is
    the quickstart's arithmetic."""
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
        if self.source in PROMPTS.built_in and self.path is None:
            raise ValueError(f"prompts.source is {self.source!r}, which needs prompts.path")
        return self


class SamplingConfig(Section):
    """How tokens are sampled during training and evaluation. The learner trains the distribution that generators sample
    from. With `top_p` or `top_k`, both compute log-probabilities of the truncated distribution, so the ratio of a fresh
    token is 1. The divergence from a reference and the entropy are those of complete distributions."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits. The learner uses the same value."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: only the likeliest tokens whose probabilities sum to this, after `top_k`; 1 switches it off."""
    top_k: NonNegative = 0
    """Only the k likeliest tokens; 0 switches it off."""
    max_new_tokens: Positive = 256
    """Cap on the response length, in tokens."""
    stop: tuple[str, ...] = Field((), strict=False)
    """Texts that end a response as soon as it contains one of them, beside the model's end-of-sequence tokens. The
    response keeps that text."""

    @field_validator("stop")
    @classmethod
    def _stop_strings_are_not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty text would end every response before its first token; leave it out")
        return stop
