"""A real file system of a few MiB, which a test can fill and empty."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BALLAST = "ballast"


def why_not() -> str | None:
    """Why there can be none here; None if there can."""
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else f"mounting is not permitted here: {probe.stderr.strip()}"


@dataclass(frozen=True)
class SmallDisk:
    """A file system at `path`."""

    path: Path

    def fill(self) -> None:
        """Take all room."""
        with (self.path / BALLAST).open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def give(self, num_bytes: int) -> None:
        """Give so much of it back."""
        ballast = self.path / BALLAST
        os.truncate(ballast, max(0, ballast.stat().st_size - num_bytes))

    def empty(self) -> None:
        """Give all of it back."""
        (self.path / BALLAST).unlink()


@contextlib.contextmanager
def small_disk(path: Path, num_mb: int) -> Iterator[SmallDisk]:
    """Mounted while inside the block."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_mb}m", "tmpfs", str(path)], check=True)
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
