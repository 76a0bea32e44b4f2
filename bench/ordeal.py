"""What is done to one run: processes are killed at random, and hardships come between the kills; see `bench.faults`."""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.hardships import (
    LIES,
    Toll,
    checkpoints,
    copied,
    cut_tails,
    flip_bit,
    knock,
    limited,
    order_lie,
    resumed_copy,
    rogue_python,
)
from tests.support.launched import LaunchedRun
from tests.support.small_disk import SmallDisk, small_disk

RUN_ENDS_WITHIN_S = 900.0
"""After its last kill, and a resumed one until its first step."""
ENDED_RUN_ENDS_WITHIN_S = 120.0
"""One that is resumed after its last step: it has nothing left to do but to end."""
KILLED_EVERY_S = 5.0
"""At most, at random."""
FIRST_STEPS = 22
"""Before anybody is killed at random: the named points are come to in these, that of the first checkpoint too."""
IMPORTS_S = 4.0
"""A launcher dies within so much of a start, at random."""
LAST_SECOND_S = 1.5
FULL_S = (2.0, 6.0)
DISK_MB = 192
KEPT = 100
"""Descriptors that a process may have more than before, after all connections to it were closed."""
COPY_STEPS = 8
"""That a copy takes beyond those of the original."""
LAUNCHER, NODE = "launcher", "local"
AGENT, KEEPER = f"agent/{NODE}", f"keeper/{NODE}"


@dataclass
class Results:
    """What came of all runs."""

    away_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    kills: Counter[str] = field(default_factory=Counter)
    """At random times, by role."""
    points: Counter[str] = field(default_factory=Counter)
    """At named points."""
    num_runs: int = 0
    num_resumed: int = 0
    num_samples: int = 0
    num_trained: int = 0
    of_ended_early: int = 0
    rewards: list[tuple[float, float, float]] = field(default_factory=list)
    """Held out: before, after a run without kills, after one with kills."""
    tolls: defaultdict[str, Toll] = field(default_factory=lambda: defaultdict(Toll))
    """By hardship."""
    failures: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        """All of them."""
        return self.kills.total() + self.points.total()


@dataclass(slots=True)
class Setting:
    """Where a run goes on, as far as its hardships need that to be prepared."""

    home: Path
    last_step: int
    disk: SmallDisk | None = None
    prefix: tuple[str, ...] = ()
    sections: dict[str, Any] = field(default_factory=dict)
    """Settings that are put over the others."""


@contextlib.contextmanager
def prepared(home: Path, hardships: tuple[str, ...], last_step: int) -> Iterator[Setting]:
    """What a run needs so that it can have these hardships."""
    setting = Setting(home, last_step)
    if "wrong-meanings" in hardships:
        setting.sections["nodes"] = [{"name": NODE, "python": str(rogue_python(home, sys.executable))}]
    if "descriptors" in hardships:
        setting.prefix = limited()
    if "full-disk" not in hardships:
        yield setting
        return
    with small_disk(home / "runs", DISK_MB) as setting.disk:
        yield setting


class Ordeal:
    """What is done to one run."""

    def __init__(self, run: LaunchedRun, setting: Setting, results: Results, rng: random.Random) -> None:
        self._run = run
        self._setting = setting
        self._results = results
        self._rng = rng
        self._begin_s = 0.0
        self._num_steps = 0
        self._is_disarmed = False
        """Whether all processes are new since a hardship: no named point kills one of them."""
        self.present: str | None = None
        """The hardship that goes on."""
        self.past: list[str] = []
        """Those that the run has had."""

    def endure(self, victims: tuple[str, ...], num_kills: int, hardships: tuple[str, ...]) -> None:
        """Kill whoever is there, and bring hardships between the kills; then see that the run comes to its end, and who
        was away. Raises `AssertionError`."""
        if "imports" in hardships and self._rng.random() < 0.5:
            self._suffer("imports", self._start_dies)
        self._wait_until(lambda: max(steps_of(self._run), default=0) >= FIRST_STEPS)
        during = [name for name in hardships if name != "last-second" and name not in self.past]
        shares = [len(range(place, num_kills, len(during) + 1)) for place in range(len(during) + 1)]
        self._kill_at_random(victims, shares[0])
        for name, share in zip(during, shares[1:], strict=True):
            self._suffer(name, self._deeds[name])
            self._kill_at_random(victims, share)
        if "last-second" in hardships:
            self._suffer("last-second", self._die_in_the_last_second)
        self._wait(time.monotonic() + RUN_ENDS_WITHIN_S)
        assert self._run.process.poll() is not None, "it does not end"
        for event in self._run.events("serves"):
            self._results.away_s[role_of(event["process"])].append(event["away_s"])

    # --- kills -------------------------------------------------------------------------------------------------

    def _kill_at_random(self, victims: tuple[str, ...], num_kills: int) -> None:
        whoever = (*victims, *victims, LAUNCHER, KEEPER)  # the whole run goes down with these two
        for _ in range(num_kills):
            self._wait(time.monotonic() + self._rng.uniform(0.0, KILLED_EVERY_S))
            if self._run.process.poll() is not None:
                break
            name = self._rng.choice(whoever)
            with contextlib.suppress(ProcessLookupError):  # it has died at its point, or of the kill before
                self._kill(name)
                self._results.kills[role_of(name)] += 1

    def _wait(self, deadline_s: float) -> None:
        """Until then or until the run has ended; go on with it when its launcher was killed."""
        while time.monotonic() < deadline_s:
            if not self._goes_on():
                return
            time.sleep(0.05)

    def _goes_on(self) -> bool:
        """Whether the run has not ended; one whose launcher was killed is resumed."""
        if self._run.process.poll() == -signal.SIGKILL and not is_finished(self._run):
            self._resume()
        return self._run.process.poll() is None

    def _resume(self) -> None:
        begin_s, num_steps = time.monotonic(), len(steps_of(self._run))
        self._run.resume()
        self._results.num_resumed += 1
        self._wait_until(lambda: len(steps_of(self._run)) > num_steps)
        self._results.away_s[LAUNCHER].append(time.monotonic() - begin_s)

    def _kill(self, name: str) -> None:
        """SIGKILL to what a process is now. Raises `ProcessLookupError`."""
        if name == LAUNCHER:
            self._kill_launcher()
        elif name in (AGENT, KEEPER):
            record = json.loads((self._run.run_dir / "nodes" / f"{NODE}.json").read_text())
            pid, num_heard = record[role_of(name)]["pid"], len(self._run.events("node_up"))
            begin_s = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            self._wait_until(lambda: len(self._run.events("node_up")) > num_heard)
            self._results.away_s[role_of(name)].append(time.monotonic() - begin_s)
        else:
            self._run.kill(name)

    def _kill_launcher(self) -> None:
        self._run.process.kill()
        self._run.process.wait(RUN_ENDS_WITHIN_S)

    def _wait_until(self, holds: Callable[[], bool], within_s: float = RUN_ENDS_WITHIN_S) -> None:
        """Or until the launcher has ended."""
        deadline_s = time.monotonic() + within_s
        while self._run.process.poll() is None and not holds():
            assert time.monotonic() < deadline_s, f"it does not come:\n{news_of(self._run)}"
            time.sleep(0.02)

    # --- hardships -------------------------------------------------------------------------------------------------

    def _suffer(self, name: str, deed: Callable[[], str | None]) -> None:
        """Bring one hardship over the run, and see that it goes on. A deed that comes too late returns None."""
        if not self._goes_on():
            return
        self.present = name
        if (words := deed()) is not None:
            self._wait_until(lambda: len(steps_of(self._run)) > self._num_steps)
            code, toll = self._run.process.poll(), self._results.tolls[name]
            assert code in (None, 0) or is_finished(self._run), f"{words}: exit code {code}: {news_of(self._run)}"
            toll.times, toll.example = toll.times + 1, words
            toll.longest_s = max(toll.longest_s, time.monotonic() - self._begin_s)
            self.past.append(name)
            print(f"  {name}: {words}; {time.monotonic() - self._begin_s:.1f} s", flush=True)
        self.present = None

    @property
    def _deeds(self) -> dict[str, Callable[[], str | None]]:
        return {
            "tails": lambda: self._lose(cut_tails),
            "checkpoint": self._damage_checkpoint,
            "imports": self._resume_dies,
            "wrong-meanings": lambda: self._once_disarmed(self._tell_a_lie),
            "copy": lambda: self._once_disarmed(self._copy),
            "full-disk": lambda: self._once_disarmed(self._fill_the_disk),
            "descriptors": lambda: self._once_disarmed(self._knock),
        }

    def _mark(self) -> None:
        """From here on the time until the next step is taken."""
        self._begin_s, self._num_steps = time.monotonic(), len(steps_of(self._run))

    def _lose(self, harm: Callable[[Path, random.Random], str]) -> str:
        """Everything dies at one moment, something is harmed, and the run is resumed."""
        self._run.kill_all()
        words = harm(self._run.run_dir, self._rng)
        self._mark()
        self._run.resume()
        self._is_disarmed = True
        return words

    def _once_disarmed(self, deed: Callable[[], str | None]) -> str | None:
        """A hardship in which no process may die has processes that do not die at a point of their own."""
        if not self._is_disarmed:
            self._lose(lambda *_: "")
            self._wait_until(lambda: len(steps_of(self._run)) > self._num_steps)
        num_steps = len(steps_of(self._run))  # one may have been killed at random just now, and be about to die
        self._wait_until(lambda: len(steps_of(self._run)) > num_steps)
        self._wait_until(lambda: is_whole(self._run))
        return deed() if self._run.process.poll() is None else None

    def _damage_checkpoint(self) -> str | None:
        """Where there is an older one to come back to."""
        self._wait_until(lambda: len(checkpoints(self._run.run_dir)) > 1)
        return self._lose(flip_bit) if self._goes_on() else None

    def _start_dies(self) -> str:
        seconds = self._rng.uniform(0.0, IMPORTS_S)
        time.sleep(seconds)
        self._kill_launcher()
        self._mark()
        if self._run.has_begun:
            self._run.resume()
            self._is_disarmed = True
            return f"{seconds:.2f} s after the start"
        self._run.start_over()
        return f"{seconds:.2f} s after the start, before there was a run"

    def _resume_dies(self) -> str:
        self._run.kill_all()
        self._mark()
        moments = [self._rng.uniform(0.0, IMPORTS_S) for _ in range(self._rng.randint(1, 2))]
        for seconds in moments:
            self._run.resume()
            self._wait_for_death(seconds)
            self._kill_launcher()
        self._run.resume()
        self._is_disarmed = True
        return ", ".join(f"{seconds:.2f} s" for seconds in moments) + " after a resume"

    def _wait_for_death(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            code = self._run.process.poll()
            assert code is None, f"a resume has ended with exit code {code}: {news_of(self._run)}"
            time.sleep(0.01)

    def _tell_a_lie(self) -> str | None:
        lie, name = self._rng.choice(sorted(LIES.items()))
        num_refused = len(self._run.events("refused"))
        self._mark()
        order_lie(self._setting.home, name, lie)
        self._run.kill(name)
        self._wait_until(lambda: len(self._run.events("refused")) > num_refused)
        if self._run.process.poll() is not None:
            return None
        culprits = [event["process"] for event in self._run.events("refused")[num_refused:]]
        assert culprits == [name], f"{name} said {lie}, and {culprits} are named"
        return f"{name} said {lie}, and was named"

    def _copy(self) -> str:
        originals = self._run.processes()
        copy = self._setting.home / f"copy-{len(self.past)}"
        self._mark()
        copied(self._run, copy, max(steps_of(self._run)) + 1 + COPY_STEPS)
        words = resumed_copy(self._run, copy)
        words += f"; meanwhile the original took {len(steps_of(self._run)) - self._num_steps} steps"
        if self._run.process.poll() is None:
            dead = [process.pid for process in originals if not lives(process)]
            assert not dead, f"processes of the original have died: {dead}: {news_of(self._run)}"
        self._mark()
        return words

    def _fill_the_disk(self) -> str:
        assert self._setting.disk is not None
        seconds = self._rng.uniform(*FULL_S)
        self._setting.disk.fill()
        try:
            time.sleep(seconds)
        finally:
            self._setting.disk.empty()
        self._mark()
        return f"full for {seconds:.1f} s"

    def _knock(self) -> str:
        originals = {process: process.num_fds() for process in self._run.processes()}
        self._mark()
        words = knock(self._run)
        self._wait_until(lambda: len(steps_of(self._run)) > self._num_steps + 1)
        if self._run.process.poll() is None:
            dead = [process.pid for process in originals if not lives(process)]
            assert not dead, f"{words}: processes have died of it: {dead}: {news_of(self._run)}"
            kept = {p.pid: p.num_fds() - before for p, before in originals.items() if p.num_fds() > before + KEPT}
            assert not kept, f"{words}: these pids have so many more descriptors: {kept}"
        return words

    def _die_in_the_last_second(self) -> str | None:
        deadline_s = time.monotonic() + RUN_ENDS_WITHIN_S
        while self._goes_on() and self._setting.last_step not in steps_of(self._run):
            assert time.monotonic() < deadline_s, "the last step does not come"
            time.sleep(0.02)
        seconds = self._rng.uniform(0.0, LAST_SECOND_S)
        end_s = time.monotonic() + seconds
        self._wait_until(lambda: time.monotonic() >= end_s)
        if self._run.process.poll() is not None or is_finished(self._run):
            return None
        self._kill_launcher()
        self._mark()
        if not is_finished(self._run):  # or it was noted just then
            self._run.resume()
            self._wait_until(lambda: False, ENDED_RUN_ENDS_WITHIN_S)
        return f"{seconds:.2f} s after the last step"


def role_of(name: str) -> str:
    """Of a process."""
    return name.partition("/")[0]


def steps_of(run: LaunchedRun) -> list[int]:
    """Of the lines of steps so far."""
    return [line["step"] for line in run.lines("metrics.jsonl") if line["type"] == "step"]


def news_of(run: LaunchedRun) -> str:
    """The newest of what it has told and noted."""
    events = [json.dumps(event) for event in run.lines("events.jsonl")[-16:]]
    return "\n".join((run.output[-2000:], *events))


def is_finished(run: LaunchedRun) -> bool:
    """Whether the end is noted: there is nothing to resume."""
    try:
        return bool(json.loads((run.run_dir / "state.json").read_text())["status"] == "finished")
    except (OSError, ValueError):  # it has lost its end, or there is no run yet
        return False


def is_whole(run: LaunchedRun) -> bool:
    """Whether every process of the plan runs, and does its work again if one before it has ended."""
    away: set[str] = set()
    for event in run.lines("events.jsonl"):
        match event["type"]:
            case "ended":
                away.add(event["process"])
            case "serves":
                away.discard(event["process"])
            case "resumed":
                away.clear()
    node = json.loads((run.run_dir / "nodes" / f"{NODE}.json").read_text())
    plan = json.loads((run.run_dir / "plan.json").read_text())
    if away or node["agent"] is None or len(node["processes"]) != len(plan["processes"]):
        return False
    try:
        return all(map(lives, run.processes()))
    except psutil.NoSuchProcess:
        return False


def lives(process: psutil.Process) -> bool:
    """Whether it has not ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
