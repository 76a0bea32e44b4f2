"""Settings of a reward that a language model gives: it reads a response, and says how good it is."""

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from darts_async.config.section import NonNegative, Positive, Seconds, Section

TEMPLATE = """You grade a response to a question.

<question>
{prompt}
</question>

<reference>
{answer}
</reference>

<response>
{response}
</response>

How good is the response, from 0 (worthless) to 10 (perfect)? Give your reasons in a few words. Then write, as the \
last line: Score: N"""


PATTERN = (
    r"(?i)score(?:[\s*_]*\([^()]*\))?"  # the scale, as in `Score (0-10): 8`
    r"(?:[^\w.\u2212-]|[.\u2212-](?!\.?\d))+"
    r"([\u2212-]?(?:\d+(?:\.\d+)?|\.\d+))"
)


class JudgeConfig(Section):
    """Asks a model at an OpenAI-compatible address. A judge that does not answer gives no reward, and the run continues
    without that response; one that refuses the request counts for `reward.max_failed_share`."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s]+$")]
    """Address of the interface, such as `http://localhost:8000/v1`."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the model there."""
    api_key_env: Annotated[str, Field(pattern=r"^\w*$")] = ""
    """Name of the environment variable that has the key. The key itself is never written to a file of the run."""
    system: str = ""
    """System message; none if it is empty."""
    template: str = TEMPLATE
    """The question. `{prompt}`, `{response}`, `{answer}` and `{metadata.FIELD}` are replaced."""
    pattern: str = PATTERN
    """Regular expression with one group, which is the score; its last match in the answer counts. Default: the
    number after the word `score`, as in `**Score:** 7/10` and `Score (0-10): 7`."""
    best: Annotated[float, Field(gt=0)] = 10.0
    """The best score. The reward is the score divided by it; a negative or larger one is a failure."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    max_verdict_tokens: Positive = 1024
    """Longest answer of the judge."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Of the complete run: each worker gets an equal share. At a time, each worker has `reward.concurrency`."""
    request_s: Seconds = 60.0
    """Time for one request."""
    total_s: Seconds = 120.0
    """Time for one response with all attempts. Less than `reward.deadline_s`."""
    max_attempts: Positive = 5
    """Requests for one response. A request is made again after a time-out, a broken connection, and the statuses 408,
    409, 425, 429 and 5xx, each time after a longer wait or as long as the server asks for."""
    cache_size: NonNegative = 10_000
    """Answers that each worker remembers, for when the same question is asked again."""

    @model_validator(mode="after")
    def _the_score_can_be_found(self) -> Self:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"pattern {self.pattern!r} has {groups} groups; write one, which is the score")
        return self

    @model_validator(mode="after")
    def _the_judge_sees_the_response(self) -> Self:
        if "{response}" not in self.template:
            raise ValueError("template has no {response}, so that the judge would not see it; write it there")
        return self
