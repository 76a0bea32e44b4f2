"""Settings of the language model and the sampling of tokens."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from darts_async.config.section import NonNegative, Positive, Section


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
