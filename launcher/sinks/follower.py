"""The process that gives the lines of `metrics.jsonl` to one sink.

    python -P -m darts_async.machine.lifetime launcher.sinks.follower RUN_DIR SINK

The first line of its standard input is the configuration as JSON. The end of its input says that no further lines
come: it takes what there is, closes the sink and leaves. It may be killed at any moment. The next one continues after
the lines that were flushed, and the sink knows its run by `Memory.key`.

    exit code 0     the sink has everything
              1     the sink raised: the reason is the last line of the output
              75    the disk is full
              78    a mistake in the input, or another follower has the sink: it is not started again
"""

import contextlib
import fcntl
import os
import secrets
import select
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from darts_async.config import RunConfig
from darts_async.errors import (
    NO_SPACE_EXIT_CODE,
    PERMANENT_ERRORS,
    PERMANENT_EXIT_CODE,
    ConfigError,
    NoSpaceError,
)
from darts_async.extensions import SINK, load
from darts_async.machine.full_disk import is_no_space
from darts_async.topology.run_files import METRICS_FILE, SINKS_DIR
from darts_async.wire.atomic_file import replace_json
from launcher.run_dir.json_lines import parsed_line
from launcher.run_dir.place import inode_of
from launcher.sinks.sink import Memory, Sink

POLL_S: Final = 0.5
LINES_PER_FLUSH: Final = 500
FAILED: Final = 1


class _Kept(msgspec.Struct, frozen=True):
    """`Memory` as it is in its file."""

    key: str
    num_lines: int
    inode: int
    """Of the run directory: in a copy it is another one, which is another run."""


def process_name(sink: str) -> str:
    """What the log of a follower is called.

    >>> process_name("wandb"), process_name("my_sink:RewardsAsCsv")
    ('sink/wandb', 'sink/my_sink.RewardsAsCsv')
    """
    return f"sink/{sink.replace(':', '.')}"


def memory_path(run_dir: Path, sink: str) -> Path:
    """Where a sink's `Memory` is kept."""
    return run_dir / SINKS_DIR / f"{sink.replace(':', '.')}.json"


def read_memory(run_dir: Path, sink: str) -> Memory:
    """What is known of a sink; a new memory if nothing is, or if it is of the run of which this is a copy."""
    try:
        kept = msgspec.json.decode(memory_path(run_dir, sink).read_bytes(), type=_Kept)
    except (OSError, msgspec.DecodeError):
        return Memory(secrets.token_hex(4))
    return Memory(kept.key, kept.num_lines) if kept.inode == inode_of(run_dir) else Memory(secrets.token_hex(4))


def write_memory(run_dir: Path, sink: str, memory: Memory) -> None:
    """Keep it. Raises `NoSpaceError`."""
    replace_json(memory_path(run_dir, sink), _Kept(memory.key, memory.num_lines, inode_of(run_dir)))


@contextlib.contextmanager
def only_follower(run_dir: Path, sink: str) -> Iterator[None]:
    """No other process follows this run for this sink inside the block. Raises `ConfigError` if one does."""
    path = memory_path(run_dir, sink).with_suffix(".lock")
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run_dir} is already followed for the sink {sink!r} by another process: a live run that has it in "
                "telemetry.sinks does so by itself; otherwise end the other `darts-launch follow`"
            ) from None
        yield
    finally:
        os.close(descriptor)


class Follower:
    """Gives lines to a sink and remembers how many it has taken."""

    def __init__(self, run_dir: Path, name: str, config: RunConfig) -> None:
        """Make the sink. Raises `ExtensionError`, `ConfigError`, or whatever the sink raises."""
        self._run_dir, self._name = run_dir, name
        self._memory = read_memory(run_dir, name)
        write_memory(run_dir, name, self._memory)  # before the service hears of the key
        self._sink: Sink = load(SINK, name)(run_dir=run_dir, config=config, memory=self._memory)
        self._offset = 0
        self._skip(self._memory.num_lines)
        write_memory(run_dir, name, self._memory)

    def take(self) -> int:
        """Give the sink what is new, at most `LINES_PER_FLUSH` lines, and remember it. Returns how many lines."""
        num_taken = 0
        for line in self._lines(LINES_PER_FLUSH):
            if (values := parsed_line(line)) is not None:
                self._sink.write(values)
            self._offset += len(line)
            num_taken += 1
        if num_taken:
            self._sink.flush()
            self._memory.num_lines += num_taken
            write_memory(self._run_dir, self._name, self._memory)
        return num_taken

    def close(self) -> None:
        """Close the sink."""
        self._sink.close()

    def _skip(self, num_lines: int) -> None:
        """Go to the position after so many lines. A file that lost its end with the power has fewer of them."""
        offset = self._memory.num_lines = 0
        for line in self._lines(num_lines):
            offset += len(line)
            self._memory.num_lines += 1
        self._offset = offset

    def _lines(self, most: int) -> Iterator[bytes]:
        """Complete lines from the position on. A torn last line is left: it may yet be completed, or cut off."""
        try:
            file = (self._run_dir / METRICS_FILE).open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for _ in range(most):
                if not (line := file.readline()).endswith(b"\n"):
                    return
                yield line


def follow(run_dir: Path, name: str, config: RunConfig, input_fd: int) -> None:
    """Follow a run until the end of the input. Raises what the sink raises."""
    with only_follower(run_dir, name):
        follower = Follower(run_dir, name, config)
        is_over, num_taken = False, 0
        while num_taken or not is_over:
            wait_s = 0.0 if num_taken or is_over else POLL_S
            is_over = is_over or bool(select.select([input_fd], [], [], wait_s)[0])
            num_taken = follower.take()
        follower.close()


def main() -> None:
    """Entry point."""
    run_dir, name = Path(sys.argv[1]), sys.argv[2]
    said = f"{process_name(name)}: "
    try:
        with os.fdopen(os.dup(0), "rb", buffering=0) as stdin:
            config = RunConfig.model_validate_json(stdin.readline())
            follow(run_dir, name, config, stdin.fileno())
    except PERMANENT_ERRORS as error:
        sys.stderr.write(f"{said}{error}\n")
        sys.exit(PERMANENT_EXIT_CODE)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary to a user's code: it is reported
        if isinstance(error, NoSpaceError) or is_no_space(error):
            sys.stderr.write(f"{said}{error}\n")
            sys.exit(NO_SPACE_EXIT_CODE)
        traceback.print_exc()
        sys.stderr.write(f"{said}{type(error).__name__}: {error}\n")
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
