"""What a reward pool and its workers say to each other over a pipe (see `wire.channel`).

A worker first sends `Ready` or `LoadFailed`, and then answers every `Job` with one `Done`. A worker without coroutine
functions has one job at a time. One with coroutine functions has several: it says `Begun` when it takes up a job, from
which moment the deadline of the job counts, and answers in any order.
"""

from typing import Literal

import msgspec
from msgspec import Struct

from darts_async.protocol import FinishReason


class CodeSpec(Struct, frozen=True):
    """The settings of `CodeConfig`, with its defaults."""

    tests_field: str = "tests"
    score: Literal["all", "share"] = "all"
    isolation: Literal["auto", "bubblewrap", "processes"] = "auto"
    allow_weaker: bool = False
    python: str = ""
    wall_s: float = 5.0
    total_s: float = 8.0
    cpu_s: int = 5
    memory_mib: float = 512.0
    processes: int = 16
    file_mib: float = 16.0
    files_mib: float = 64.0
    output_kib: float = 1024.0


class JudgeSpec(Struct, frozen=True):
    """The settings of `JudgeConfig`, as one worker keeps them."""

    url: str
    model: str
    template: str
    pattern: str
    api_key_env: str = ""
    system: str = ""
    best: float = 10.0
    temperature: float = 0.0
    max_verdict_tokens: int = 1024
    requests_per_minute: float | None = None
    """Of this worker."""
    request_s: float = 60.0
    total_s: float = 120.0
    max_attempts: int = 5
    cache_size: int = 10_000
    concurrency: int = 16
    """Requests at a time."""


class FunctionSpec(Struct, frozen=True):
    """One reward function, as the settings name it."""

    function: str
    label: str = ""
    """Name of its curves; empty for a single function."""
    takes: Literal["sample", "batch"] = "sample"
    weight: float = 1.0
    code: CodeSpec | None = None
    judge: JudgeSpec | None = None
    """One of these is set where it is not a function that is loaded."""


FunctionSpecs = tuple[FunctionSpec, ...]


def as_argument(functions: FunctionSpecs) -> str:
    """The functions as text, for a command line; the inverse of `of_argument`."""
    return msgspec.json.encode(functions).decode()


def of_argument(argument: str) -> FunctionSpecs:
    """The inverse of `as_argument`."""
    return msgspec.json.decode(argument, type=FunctionSpecs)


class WorkItem(Struct, frozen=True):
    """One response to score."""

    prompt: str
    answer: str
    metadata_json: str
    finish_reason: FinishReason
    token_ids: bytes  # int32, native byte order: both ends are on one machine

    @property
    def num_bytes(self) -> int:
        """About the size of it in a message."""
        return len(self.prompt) + len(self.answer) + len(self.metadata_json) + len(self.token_ids)


class Job(Struct, frozen=True):
    """Responses that the functions are called for together."""

    job_id: int
    deadline_s: float
    items: list[WorkItem]


class Ready(Struct, frozen=True, tag=True):
    """The functions and the tokenizer are loaded."""

    is_async: bool
    """Whether one of them is a coroutine function, so that the worker may have several jobs."""


class LoadFailed(Struct, frozen=True, tag=True):
    """A function or the tokenizer cannot be loaded; the worker ends."""

    error: str


class Begun(Struct, frozen=True, tag=True):
    """The worker has taken up this job."""

    job_id: int


class Rewarded(Struct, frozen=True, tag=True):
    """Every function returned a finite number."""

    reward: float
    """Their weighted sum."""
    parts: tuple[float, ...] = ()
    """What each of several functions returned, without its weight."""


class Failed(Struct, frozen=True, tag=True):
    """A function raised, took too long, or returned something else."""

    kind: Literal["raised", "wrong_type", "not_finite", "limit", "timeout", "unavailable"]
    error: str


class Done(Struct, frozen=True, tag=True):
    """The answers to a job, in the order of its items."""

    job_id: int
    replies: list[Rewarded | Failed]


WorkerReply = Ready | LoadFailed | Begun | Done


def failure_text(kind: str, error: str) -> str:
    """A failed reward in one line: of a traceback the last one, which is the exception, else the first one."""
    lines = error.strip().splitlines() or [""]
    return f"{kind}: {lines[-1 if kind == 'raised' else 0]}"
