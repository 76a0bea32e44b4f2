"""Simulates a power loss: damages the real files of a simulated shaper as a disk would.

Flushed bytes are on the disk. A file may end anywhere after them. A name that was given to another file, and not
flushed since, may be that of the old file again. In the worst plans the disk keeps no promise: any file may end
anywhere, be empty, be gone, or have a wrong bit.
"""

import os
from collections import Counter
from pathlib import Path
from random import Random

from darts_async.topology.run_files import JOURNAL_FILE, LEDGER_FILE

FILES = (JOURNAL_FILE, LEDGER_FILE)
_SHORT_TAIL_BYTES = 2000
_TAIL_SHARE = 0.6
"""Of the losses: most are of an end."""


class DiskOfShaper:
    """Journal and ledger of a run, and how much of them is certainly on the disk."""

    def __init__(self, run_dir: Path, rng: Random, counts: Counter[str]) -> None:
        self._run_dir = run_dir
        self._rng = rng
        self._counts = counts
        self._flushed: dict[int, int] = {}
        """{inode: bytes}"""

    @property
    def _before(self) -> Path:
        """The journal that had the name when it was last flushed; another may have it by now."""
        return self._run_dir / f"{JOURNAL_FILE}.before"

    def sizes(self) -> dict[int, int]:
        """For `flushed`, when a flush that begins now has ended."""
        paths = [self._run_dir / name for name in (*FILES, Path(JOURNAL_FILE).with_suffix(".new"))]
        stats = [path.stat() for path in paths if path.exists()]
        return {stat.st_ino: stat.st_size for stat in stats}

    def flushed(self, sizes: dict[int, int]) -> None:
        """So much of each file is on the disk, with the names that the files had when the flush began."""
        self._flushed = sizes
        journal = self._run_dir / JOURNAL_FILE
        if journal.exists() and journal.stat().st_ino in sizes:
            self._before.unlink(missing_ok=True)

    def keep_journal(self) -> None:
        """Another may be about to take its name."""
        if not self._before.exists():
            os.link(self._run_dir / JOURNAL_FILE, self._before)

    def lose_unflushed(self) -> None:
        """Each file keeps what was flushed, and a random part of the rest."""
        journal = self._run_dir / JOURNAL_FILE
        if self._before.exists():
            if not self._before.samefile(journal) and self._rng.random() < 0.5:
                self._counts["shaper.journal in the place of its successor"] += 1
                os.replace(self._before, journal)
            self._before.unlink(missing_ok=True)
        for name in FILES:
            path = self._run_dir / name
            if path.exists():
                stat = path.stat()
                certain = min(self._flushed.get(stat.st_ino, stat.st_size), stat.st_size)
                self._cut(name, self._rng.randint(certain, stat.st_size))

    def lose_anything(self) -> None:
        """A disk that keeps no promise loses power."""
        for name in FILES:
            path = self._run_dir / name
            if path.exists() and self._rng.random() < 2 / 3:
                self._lose(name, path)

    def _lose(self, name: str, path: Path) -> None:
        size = path.stat().st_size
        if self._rng.random() < _TAIL_SHARE:
            most = size if self._rng.random() < 0.5 else min(size, _SHORT_TAIL_BYTES)
            self._cut(name, size - self._rng.randint(0, most))
        elif (how := self._rng.choice(("emptied", "gone", "bit"))) == "bit":
            self._flip(name, path, size)
        elif how == "gone":
            self._counts[f"{name} gone"] += 1
            path.unlink()
        else:
            self._counts[f"{name} emptied"] += 1
            os.truncate(path, 0)

    def _cut(self, name: str, num_bytes: int) -> None:
        path = self._run_dir / name
        if num_bytes < path.stat().st_size:
            self._counts[f"{name} without its end"] += 1
            os.truncate(path, num_bytes)

    def _flip(self, name: str, path: Path, size: int) -> None:
        if not size:
            return
        self._counts[f"{name} with a wrong bit"] += 1
        data = bytearray(path.read_bytes())
        data[self._rng.randrange(size)] ^= 1 << self._rng.randrange(8)
        path.write_bytes(data)
