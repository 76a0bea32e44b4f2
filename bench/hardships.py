"""What happens to a run beside the deaths of its processes. Which of it each run of `bench.faults` gets goes round.

    tails           everything dies, and some files have lost an end of any length, or all they had
    checkpoint      everything dies, and one bit of the newest checkpoint is another
    imports         the launcher dies while the processes of a start or of a resume import
    wrong-meanings  a member with the keys of the run says, well-formed, what cannot be meant
    copy            the directory of the live run is copied, and the copy is resumed beside the original
    full-disk       nothing can be written for some seconds
    descriptors     few open files are allowed, and every port is connected to and left many times
    last-second     the launcher dies after the last step and before the end is noted

Here is what is pure, and what is done to files and ports; `bench.ordeal` does it to a run at the right moment.
"""

import random
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests import ROOT
from tests.support.launched import LaunchedRun, listening

HARDSHIPS = (
    "tails",
    "checkpoint",
    "imports",
    "wrong-meanings",
    "copy",
    "full-disk",
    "descriptors",
    "last-second",
)
"""In the order in which one run gets them: those after which all processes are new come first."""
PER_RUN = 3
TAILS = ("shaper.journal", "ledger.msgpack", "metrics.jsonl", "events.jsonl", "state.json")
"""Files that are appended to, or replaced, all the time."""
LOST_BYTES = (16, 512, 8192, 1 << 30)
"""A loss is of up to one of these: in the last record, of a few, of many, of any length."""
EMPTIED_SHARE = 0.15
"""Of the losses leave nothing."""
OPEN_FILES = 300
CONNECTIONS = 400
"""To each port."""
LIES = {
    "future_weights": "generator/1",
    "surplus_frame": "generator/1",
    "future_member": "generator/1",
    "end_of_run": "generator/1",
    "nan": "reward/1",
}
"""What `tests.fakes.rogue` can say, and who says it."""
ROGUE = """\
#!/bin/sh
# The Python of a run's processes. One of them, and one time, is a rogue: the one that `{order}` names.
read -r name lie 2>/dev/null < '{order}' || exec '{python}' "$@"
case " $* " in *" --name $name "*) mv '{order}' '{order}.taken' || exit 1 ;; *) exec '{python}' "$@" ;; esac
for word; do
    shift
    case "$word" in darts_async.*.process) word=tests.fakes.rogue ;; esac
    set -- "$@" "$word"
done
PYTHONPATH='{root}' LIE=$lie LIES_AT_ONCE=1 exec '{python}' "$@"
"""


@dataclass(slots=True)
class Toll:
    """What one hardship has come to, over all runs."""

    times: int = 0
    runs: int = 0
    failed: int = 0
    """Runs that failed in it, or at their end after it."""
    longest_s: float = 0.0
    """Until the run took its next step, or ended."""
    example: str = ""
    """What was done the last time."""


def rotated(names: Sequence[str], index: int, number: int = PER_RUN) -> tuple[str, ...]:
    """The hardships of a run, in their order: over all runs each comes as often as any other."""
    places = ((index * number + position) % len(names) for position in range(min(number, len(names))))
    return tuple(sorted((names[place] for place in places), key=HARDSHIPS.index))


def rows(tolls: Mapping[str, Toll]) -> list[str]:
    """A section of the results as Markdown; nothing if there was no hardship."""
    if not tolls:
        return []
    return [
        "",
        "| hardship | times | runs | failed | longest until the next step | for example |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {toll.times} | {toll.runs} | {toll.failed} | {toll.longest_s:.1f} s | {toll.example} |"
            for name, toll in sorted(tolls.items(), key=lambda item: HARDSHIPS.index(item[0]))
        ),
    ]


# --- files -------------------------------------------------------------------------------------------------------


def shortened(sizes: Mapping[str, int], rng: random.Random) -> dict[str, int]:
    """How long some of the files are after a loss, one or more of them, each independently."""
    names = sorted(name for name, size in sizes.items() if size > 0)
    chosen = rng.sample(names, rng.randint(1, len(names)) if rng.random() < 0.5 else 1) if names else []
    left = {}
    for name in sorted(chosen):
        lost = rng.randint(1, min(sizes[name], rng.choice(LOST_BYTES)))
        left[name] = 0 if rng.random() < EMPTIED_SHARE else sizes[name] - lost
    return left


def cut_tails(run_dir: Path, rng: random.Random) -> str:
    """Have files of a dead run lose their ends."""
    sizes = {name: (run_dir / name).stat().st_size for name in TAILS if (run_dir / name).exists()}
    left = shortened(sizes, rng)
    for name, size in left.items():
        with (run_dir / name).open("r+b") as file:
            file.truncate(size)
    return ", ".join(f"{name} {sizes[name]} -> {size}" for name, size in left.items())


def checkpoints(run_dir: Path) -> list[Path]:
    """Those that are in place, oldest first; one that is known to be damaged has another name."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def flip_bit(run_dir: Path, rng: random.Random) -> str:
    """Change one bit of one file of the newest checkpoint of a dead run."""
    newest = checkpoints(run_dir)[-1]
    file = rng.choice(sorted(path for path in newest.iterdir() if path.is_file() and path.stat().st_size > 0))
    place, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"{newest.name}/{file.name}, bit {bit} of byte {place}"


# --- copies --------------------------------------------------------------------------------------------------------


def copied(run: LaunchedRun, target: Path, num_steps: int) -> None:
    """A copy of the directory of a live run, as `cp -a` makes it, that ends after so many steps.

    Files that are replaced meanwhile may not be found: `cp` goes on, and says so by its exit code.
    """
    subprocess.run(["cp", "-a", str(run.run_dir), str(target)], check=False, capture_output=True)
    config = target / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["learner"]["steps"] = min(num_steps, settings["learner"]["steps"])
    config.write_text(yaml.safe_dump(settings))


def resumed_copy(run: LaunchedRun, target: Path) -> str:
    """Resume a copy. Raises `AssertionError` where it neither runs to a clean end nor is refused with a reason."""
    done = run.verb("resume", str(target))
    told = (done.stdout + done.stderr)[-2000:]
    assert "Traceback" not in told, f"the copy: {told}"
    if done.returncode == 2:
        assert str(target) in " ".join(told.split()), f"the copy is refused without a reason: {told}"
        return f"refused: {' '.join(told.split())[-160:]}"
    assert done.returncode == 0, f"the copy ends with exit code {done.returncode}: {told}"
    audit = run.verb("audit", str(target))
    assert audit.returncode == 0, f"the copy: {audit.stdout}{audit.stderr}"
    return "the copy ran to its end, and its audit is clean"


# --- members and strangers -------------------------------------------------------------------------------------


def rogue_python(home: Path, python: str) -> Path:
    """A Python for the processes of a run, one of which `order_lie` can make a rogue."""
    path = home / "python"
    path.write_text(ROGUE.format(order=home / "lie", python=python, root=ROOT))
    path.chmod(0o755)
    return path


def order_lie(home: Path, name: str, lie: str) -> None:
    """The next incarnation of a process says this."""
    staged = home / "lie.staged"
    staged.write_text(f"{name} {lie}\n")
    staged.rename(home / "lie")


def limited(number: int = OPEN_FILES) -> tuple[str, ...]:
    """What goes before a command line for a run that may have few open files."""
    return ("sh", "-c", f'ulimit -n {number}; exec "$@"', "limited")


def knock(run: LaunchedRun, number: int = CONNECTIONS) -> str:
    """Connect to every port of a run and leave. Over loopback a connection is there at once, or does not come."""
    addresses = sorted(listening(run))
    for address in addresses:
        for _ in range(number):
            with socket.socket() as stranger:
                stranger.setblocking(False)
                stranger.connect_ex(address)
    return f"{number} connections to each of {len(addresses)} ports"
