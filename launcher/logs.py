"""The logs of processes, as lines for people: what is there, and what comes."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from darts_async.topology import file_stem
from launcher.supervisor import readable_line

_CHUNK_BYTES = 1 << 20


@dataclass(slots=True)
class LogTail:
    """The end of one file, which grows and need not exist yet."""

    path: Path
    label: str
    _offset: int = 0
    _torn: bytes = field(default=b"")

    def new_lines(self) -> Iterator[str]:
        """The whole lines that have come since the last call, at most a chunk of them."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(_CHUNK_BYTES)
        except FileNotFoundError:
            return
        self._offset += len(data)
        *lines, self._torn = (self._torn + data).split(b"\n")
        for line in lines:
            if line.strip():
                yield f"{self.label}  {readable_line(line.decode(errors='replace')).rstrip()}"

    def skip_to_last(self, num_lines: int) -> list[str]:
        """Read what is there; the last lines of it."""
        kept: deque[str] = deque(maxlen=num_lines)
        read_to = -1
        while read_to != self._offset:
            read_to = self._offset
            kept.extend(self.new_lines())
        return list(kept)


def log_tails(logs_dir: Path, names: tuple[str, ...]) -> list[LogTail]:
    """The files of some processes: what each has logged, and what else it has printed."""
    width = max(map(len, names))
    return [
        LogTail(logs_dir / f"{file_stem(name)}{suffix}", name.ljust(width))
        for name in names
        for suffix in (".jsonl", ".out")
    ]
