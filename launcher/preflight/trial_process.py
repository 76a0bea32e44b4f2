"""A child that tries out what a run names, in a session of its own: the launcher is not to import it."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator

import msgspec

from darts_async.machine.lifetime import PARENT_PID_VARIABLE
from darts_async.machine.spawn import module_command, signal_name


class TrialError(Exception):
    """The child has ended without an answer: how it ended, and its last words."""


class TrialProcess:
    """A child that was asked a question, which is JSON on its standard input."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    def answer(self, deadline_s: float) -> bytes:
        """What it has written to standard output. Raises `TimeoutError` or `TrialError`."""
        try:
            output, errors = self._child.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error
        if not output:
            code = self._child.returncode
            last = (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise TrialError(f"({f'exit code {code}' if code >= 0 else signal_name(-code)}): {last}")
        return output


@contextlib.contextmanager
def trial_process(module: str, question: msgspec.Struct, **environment: str) -> Iterator[TrialProcess]:
    """Start `python -m module`. Leaving the block ends it and all that it has started in its session."""
    with tempfile.TemporaryFile() as file:  # a pipe may be full before the child reads it
        file.write(msgspec.json.encode(question))
        file.seek(0)
        child = subprocess.Popen(
            module_command(module),
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | environment | {PARENT_PID_VARIABLE: str(os.getpid())},
            start_new_session=True,
        )
    try:
        yield TrialProcess(child)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
