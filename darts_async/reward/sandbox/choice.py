"""Finds out which walls this machine allows around a program, by trying them with a harmless program (`probe`).

The candidates are tried from the strongest to the weakest. The first one without a gap is taken. Without such a one no
program is run, unless the settings allow it.
"""

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from darts_async.errors import ConfigError, SandboxError
from darts_async.reward.sandbox import confine, probe
from darts_async.reward.sandbox.isolation import Isolation, own_user_id
from darts_async.reward.sandbox.program import ProgramLimits, run_program

_LIMITS = ProgramLimits(wall_s=30.0, cpu_s=10, processes=4)
Kind = Literal["auto", "bubblewrap", "processes"]


class _Seen(msgspec.Struct, frozen=True):
    """What the probe prints."""

    num_forks: int
    could_read: bool
    could_write: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """Walls, and what they leave open."""

    isolation: Isolation
    gaps: tuple[str, ...] = ()
    """What a program could do that it should not."""
    complaint: str = ""
    """Why no program runs in them; empty if one does."""

    def describe(self) -> str:
        """For people."""
        left = f"; a program can {' and '.join(self.gaps)}" if self.gaps else ""
        return f"{self.isolation.describe()}{left}"

    @property
    def fault(self) -> str:
        """What is wrong with them; empty for nothing."""
        return self.complaint or (self.gaps and f"a program could {' and '.join(self.gaps)}") or ""


@cache
def choose_isolation(wanted: Kind, python: str, *, allow_weaker: bool) -> Choice:
    """The strongest isolation of this machine, or of the kind that is wanted. Takes about a second: it is tried.

    Args:
        wanted: `auto` for any kind.
        python: path of the interpreter that runs programs.
        allow_weaker: take walls with gaps, those with the fewest, if there are none without.

    Raises:
        ConfigError: there is none, or `python` does not work.
    """
    tried = list[Choice]()
    for candidate in _candidates(wanted, python):
        tried.append(look_at(candidate))
        if not tried[-1].complaint and not tried[-1].gaps:
            return tried[-1]
    usable = [choice for choice in tried if not choice.complaint]
    if usable and allow_weaker:
        return min(usable, key=lambda choice: len(choice.gaps))
    reasons = [f"with {choice.isolation.describe()}: {choice.fault}" for choice in tried]
    if wanted != "processes" and shutil.which("bwrap") is None:
        reasons.insert(0, "bubblewrap is not installed")
    weaker = ", or set `allow_weaker: true` if the machine has nothing to lose" if usable else ""
    raise ConfigError(
        f"programs cannot be confined on this machine (`isolation` of `code` is {wanted!r}). {'. '.join(reasons)}. "
        f"Install the package `bubblewrap` and permit user namespaces{weaker}"
    )


def look_at(isolation: Isolation) -> Choice:
    """Try some walls."""
    with contextlib.ExitStack() as stack:
        secret = stack.enter_context(tempfile.NamedTemporaryFile(prefix="darts-secret-"))  # its mode is 600
        secret.write(b"secret")
        secret.flush()
        listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        listener.bind(("127.0.0.1", 0))
        listener.setblocking(False)
        argv = (isolation.python, "-I", "probe.py", secret.name, str(listener.getsockname()[1]))
        try:
            outcome = run_program(argv, {"probe.py": Path(probe.__file__).read_bytes()}, isolation, _LIMITS)
        except SandboxError as error:
            return Choice(isolation, complaint=str(error).removeprefix(f"{isolation.describe()}: "))
        if outcome.breach == "processes":
            return Choice(isolation, ("start processes without a bound",))
        try:
            seen = msgspec.json.decode(outcome.stdout, type=_Seen)
        except msgspec.MsgspecError:
            said = outcome.stderr.decode(errors="replace").strip()[-300:] or "it printed nothing"
            return Choice(isolation, complaint=f"it ended with {outcome.exit_code}: {said}")
        return Choice(isolation, tuple(_gaps(isolation, seen, listener)))


def _gaps(isolation: Isolation, seen: _Seen, listener: socket.socket) -> Iterator[str]:
    if seen.num_forks == probe.MOST_FORKS:
        yield "start processes without a bound"
    if seen.could_read:
        yield "read files of the run"
    if seen.could_write:
        yield "write files of others"
    with contextlib.suppress(BlockingIOError):
        if listener.recv(len(probe.SENT)):
            yield "reach the network"
    if isolation.kind == "processes" and not (isolation.namespaces or isolation.user_id or isolation.landlock >= 6):
        yield "send signals to processes of the run"


def _candidates(wanted: Kind, python: str) -> Iterator[Isolation]:
    user_id, landlock = own_user_id() if os.geteuid() == 0 else 0, confine.landlock_version()
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is not None and wanted != "processes":
        yield Isolation("bubblewrap", python, bubblewrap, user_id=user_id)
    if wanted != "bubblewrap":
        for version in dict.fromkeys((landlock, 0)):
            for namespaces in (True, False):
                yield Isolation("processes", python, "", version, namespaces, confine.can_refuse_sockets(), user_id)
