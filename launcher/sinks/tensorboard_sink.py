"""TensorBoard: one event file per run, in which each line of the metrics is one record.

So the number of complete records tells how many lines the file has, and a follower that was killed repeats none.
Where a step comes again, TensorBoard shows the later value.
"""

import struct
from pathlib import Path
from typing import Any, Final

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from darts_async.config import RunConfig
from darts_async.config.paths import expanded
from launcher.sinks.sink import Memory, point_of, unix_s_of

_LENGTH: Final = struct.Struct("<Q")
_CHECKSUM_BYTES: Final = 4


class TensorBoardSink:
    """Writes `events.out.tfevents.*` below the run directory, or below `telemetry.tensorboard.path`."""

    def __init__(self, run_dir: Path, config: RunConfig, memory: Memory) -> None:
        """Continue the event file of the run, or begin it."""
        path = config.telemetry.tensorboard.path
        folder = (
            run_dir / "tensorboard" if path is None else expanded(path, "telemetry.tensorboard.path") / run_dir.name
        )
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"events.out.tfevents.{memory.key}"
        num_records, num_bytes = _complete_records(file)
        memory.num_lines = max(0, num_records - 1)
        self._file = file.open("ab")
        self._file.truncate(num_bytes)
        self._records = RecordWriter(self._file)
        if not num_records:
            self._records.write(Event(file_version="brain.Event:2").SerializeToString())

    def write(self, line: dict[str, Any]) -> None:
        """One record, also for a line without metrics."""
        event = Event(wall_time=unix_s_of(line))
        if (point := point_of(line)) is not None:
            event.step = point.step
            for name, value in point.metrics.items():
                event.summary.value.append(Summary.Value(tag=name, simple_value=value))
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Hand the records to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _complete_records(path: Path) -> tuple[int, int]:
    """How many records an event file has, and how many bytes these are. A kill may tear the last one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0, 0
    num_records = end = 0
    while end + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, end)
        after = end + _LENGTH.size + length + 2 * _CHECKSUM_BYTES
        if after > len(data):
            break
        num_records, end = num_records + 1, after
    return num_records, end
