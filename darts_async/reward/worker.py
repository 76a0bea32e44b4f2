"""A reward worker is a process that scores responses, so that a function may hang, leak or crash.

Its warden forks it and calls `work`. Jobs arrive on standard input and replies leave on standard output
(`worker_messages`). Both move to private descriptors before any foreign code runs. So the output of a function goes to
standard error, its input is empty, and its child processes inherit neither pipe. The worker ends at the end of its
input, and the kernel ends it with its warden.

Plain functions are called in the main thread, one job after another: they may use signals, or `asyncio.run`. Coroutine
functions run in the event loop of a second thread, those of several jobs at the same time.
"""

import asyncio
import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from darts_async.errors import ConfigError, ExtensionError, ModelError
from darts_async.extensions import REWARD, REWARDS, load
from darts_async.models.location import load_tokenizer
from darts_async.reward.scorer import RewardFunction, Scorer, Scoring, last_lines
from darts_async.reward.worker_messages import Begun, Done, FunctionSpec, FunctionSpecs, Job, LoadFailed, Ready
from darts_async.wire.channel import read_message, write_message
from darts_async.wire.encoding import decoder


class _Replies:
    """The pipe of the replies, for two threads."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def write(self, message: msgspec.Struct) -> None:
        """Write one message."""
        with self._lock:
            write_message(self._pipe, message)


class _CoroutineThread:
    """The event loop in which coroutine functions run."""

    def __init__(self, replies: _Replies) -> None:
        self._replies = replies
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="coroutine functions", daemon=True).start()

    def finish(self, job_id: int, scoring: Scoring) -> None:
        """Await what is left of a job and answer it, without waiting for that here."""
        asyncio.run_coroutine_threadsafe(self._finish(job_id, scoring), self._loop)

    async def _finish(self, job_id: int, scoring: Scoring) -> None:
        await scoring.await_coroutines()
        self._replies.write(Done(job_id, scoring.replies()))


def serve(
    jobs: BinaryIO, replies: BinaryIO, functions: FunctionSpecs, tokenizer_dir: Path, on_job: Callable[[], None]
) -> None:
    """Score until the input ends. `on_job` is called before each job."""
    pipe = _Replies(replies)
    try:
        scorer = Scorer([RewardFunction(spec, _loaded(spec)) for spec in functions], load_tokenizer(tokenizer_dir))
    except (ConfigError, ExtensionError, ModelError) as error:
        cause = f"\n{last_lines(error.__cause__)}" if error.__cause__ is not None else ""
        pipe.write(LoadFailed(f"{error}{cause}"))
        return
    coroutines = _CoroutineThread(pipe) if scorer.is_async else None
    pipe.write(Ready(scorer.is_async))
    decode = decoder(Job)
    while (job := read_message(jobs, decode)) is not None:
        on_job()
        if coroutines is None:
            pipe.write(Done(job.job_id, scorer.begin(job).replies()))
        else:
            pipe.write(Begun(job.job_id))
            coroutines.finish(job.job_id, scorer.begin(job))


def _loaded(spec: FunctionSpec) -> Callable[..., object]:
    if spec.code is not None:
        from darts_async.reward.code import CodeReward  # few runs need it

        programs = CodeReward(spec.code)
        sys.stderr.write(f"{spec.label}: programs run in {programs.choice.describe()}\n")
        return programs
    if spec.judge is not None:
        from darts_async.reward.judge import JudgeReward  # few runs need it

        return JudgeReward(spec.judge)
    return load(REWARDS[spec.takes] if spec.label else REWARD, spec.function)


def work(functions: FunctionSpecs, tokenizer_dir: Path, on_job: Callable[[], None]) -> None:
    """The complete life of a worker."""
    faulthandler.enable()
    jobs, replies = _claim_pipes()
    serve(jobs, replies, functions, tokenizer_dir, on_job)


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return jobs, replies
