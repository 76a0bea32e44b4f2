"""A child that answers one question, in a session of its own: for what is not to be imported here, or may not end."""

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
    """Start `python -m module` with additions to its environment.

    Leaving the block ends it and all that it has started in its session. A process that it has started elsewhere and
    that holds its pipes is not waited for.

    Example:
        >>> with trial_process("package.module", question) as child:  # doctest: +SKIP
        ...     answer = child.answer(deadline_s=60.0)
    """
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
    with child:  # closes the pipes
        try:
            yield TrialProcess(child)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
