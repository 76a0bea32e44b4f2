"""Settings of the reward: how responses are scored."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from darts_async.config.reward_code import CodeConfig
from darts_async.config.reward_judge import JudgeConfig
from darts_async.config.section import Positive, Seconds, Section, named
from darts_async.extensions import REWARD, REWARDS

Size = Annotated[float, Field(gt=0)]


class RewardLimitsConfig(Section):
    """What each worker may use, together with all processes that the reward function starts. `null` means no limit. A
    response that exceeds a limit has no reward."""

    memory_gib: Size | None = 32.0
    """Memory of the worker and its processes together. Measured several times a second."""
    processes: Positive | None = 256
    """Number of processes at a time, including the worker. Measured several times a second."""
    file_gib: Size | None = 16.0
    """Size of each file that is written."""
    output_mib: Size | None = 16.0
    """Size of what is printed for one item. It goes to the log of the reward process."""


_KINDS = ("function", "code", "judge")


class RewardFunctionConfig(Section):
    """One of several reward functions: a `function` of yours or ours, `code`, or a `judge`. The reward of a response is
    the sum of what they return, each times its weight; `rewards/NAME/mean` and `rewards/NAME/std` are the curves of
    each, without the weight. If one of them fails, the response has no reward."""

    function: Annotated[str, Field(max_length=1_000), named(REWARDS["sample"])] | None = None
    """`math`, `exact_match`, or `module:name`. It may be a coroutine function (`async def`)."""
    code: CodeConfig | None = None
    """Runs the program in the response on the test cases of its record."""
    judge: JudgeConfig | None = None
    """Asks another model."""
    takes: Literal["sample", "batch"] = "sample"
    """What it is called with. `sample`: one response. `batch`: the responses that wait, at most `reward.max_batch`, as
    lists; it returns a list of numbers."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,64}$")] = ""
    """Name of its curves. Default: the function's own name."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """May be negative. With 0 it has its curves, and no influence."""

    @model_validator(mode="after")
    def _it_is_one_thing(self) -> Self:
        kinds = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            said = " and ".join(map(repr, kinds)) or "none of them"
            raise ValueError(f"each of reward.functions has one of `function`, `code` and `judge`, and one has {said}")
        return self

    @model_validator(mode="after")
    def _ours_take_a_sample(self) -> Self:
        if self.takes != "sample" and (self.function is None or self.function in REWARD.built_in):
            raise ValueError(f"{self.kind!r} takes a sample, and `takes` is {self.takes!r}; leave `takes` out")
        return self

    @property
    def kind(self) -> str:
        """What it names, or `code`, or `judge`."""
        return self.function or next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def label(self) -> str:
        """The name of its curves."""
        return self.name or self.kind.rpartition(":")[2]


class RewardConfig(Section):
    """How responses are scored: by one `function`, or by the sum of several `functions`."""

    function: Annotated[str, Field(max_length=1_000), named(REWARD)] | None = "darts_async.quickstart.task:reward"
    """`math`, `exact_match`, or `module:name`; the default is the quickstart's verifier. `null` with `functions`."""
    functions: tuple[RewardFunctionConfig, ...] = Field((), strict=False, max_length=64)
    """Several functions, each with a weight and curves of its own, in place of `function`."""
    workers: Positive = 1
    """Worker processes of each reward process."""
    concurrency: Positive = 16
    """Responses that a worker has under way at a time, if a function is a coroutine function; one otherwise."""
    max_batch: Positive = 32
    """Most responses that a function that takes a `batch` is called with."""
    deadline_s: Seconds = 10.0
    """An item that takes longer has failed, and its worker is replaced. A coroutine that takes longer is cancelled, and
    its worker continues."""
    start_deadline_s: Seconds = 60.0
    """The same limit for a new worker: for the import of the functions, and for the first item, at which many functions
    load what they need."""
    limits: RewardLimitsConfig = RewardLimitsConfig()
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """The run fails when more than this share of the last 200 items of a function failed."""

    @model_validator(mode="before")
    @classmethod
    def _several_take_the_place_of_the_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("functions"):
            return {"function": None} | data
        return data

    @model_validator(mode="after")
    def _either_one_or_several(self) -> Self:
        if self.function is None and not self.functions:
            raise ValueError("reward.function is null and reward.functions is empty; name a function in one of them")
        if self.function is not None and self.functions:
            raise ValueError(
                f"reward.function is {self.function!r}, but reward.functions is set too; move the first into the "
                "second, as `- function: " + self.function + "`"
            )
        return self

    @model_validator(mode="after")
    def _each_ends_before_the_deadline(self) -> Self:
        for part in self.functions:
            total_s = max(timed.total_s for timed in (part.code, part.judge) if timed) if part.function is None else 0.0
            if total_s >= self.deadline_s:
                raise ValueError(
                    f"total_s of `{part.kind}` is {total_s:g}, but a response has no reward after reward.deadline_s "
                    f"({self.deadline_s:g}); raise the second or lower the first"
                )
        return self

    @model_validator(mode="after")
    def _curves_have_names_of_their_own(self) -> Self:
        labels = [part.label for part in self.functions]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"reward.functions has two with the name {twice!r}; give each a `name` of its own")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """What the settings name, in their order."""
        return (self.function,) if self.function is not None else tuple(part.kind for part in self.functions)

    @property
    def description(self) -> str:
        """For an error."""
        return f"reward function{'s' if self.functions else ''} {', '.join(map(repr, self.names))}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the curves, one for each of several functions; none for a single function, whose reward has them
        already."""
        return tuple(part.label for part in self.functions)
