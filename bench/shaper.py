"""How many samples a minute can be simulated on one core, and how much does the shaper itself take?

    python -m bench.shaper [--trace PATH] [--steps N] [--repeats N] [--in-flight N ...] [--out DIR]

Two measurements, both in processor time. The simulator: a whole run, peers included (see `darts_async.simulation`). The
state machine alone: `ShaperState` with so many samples in flight, fed what generators of 128-sample batches send that
flush every 4 steps, until every sample of the start has been replaced several times over or the time is up; only the
calls of the state machine are timed. Beside them, what the process around it does with each message: it compares it
with the state (`shaper.boundary`) and writes what was decided to the ledger.
"""

import argparse
import math
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from bench.charts import Panel, draw_curves, for_plots
from bench.results import conditions, keep, table
from bench.shaping import ARMS
from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.prompts.source import Prompt, ShuffledPrompts
from darts_async.protocol import (
    Cancel,
    Generate,
    GeneratorReady,
    Greet,
    GroupsCommitted,
    LearnerReady,
    RewardReady,
    SampleCancelled,
    SampleFinished,
    SampleScored,
    Score,
    TokensDecoded,
    TrainGroup,
    VersionPublished,
    VersionSaved,
    WeightsApplied,
)
from darts_async.shaper.boundary import Boundary
from darts_async.shaper.ledger import LedgerWriter, SampleEnded
from darts_async.shaper.outbox import Forget, Output, SendTo
from darts_async.shaper.phases import RunPhase
from darts_async.shaper.state import Incoming, ShaperState
from darts_async.simulation.demand import LognormalWorkload, TraceWorkload, Workload
from darts_async.simulation.run import simulate
from darts_async.topology.roles import LEARNER
from darts_async.topology.run_files import LEDGER_FILE

MAX_NEW_TOKENS = 4096
NUM_PROMPTS = 512
GENERATORS = 8
STEPS_PER_FLUSH = 4
SAMPLES_PER_MESSAGE = 128
MEAN_TOKENS = 512
LAUNCH = 10
MAX_STALENESS = 32
REWARD = "reward/0"
GOAL_TOKENS_PER_S = 1e6
PLOT = "shaper.png"


@dataclass(frozen=True)
class Rate:
    """What one run of the simulator took."""

    num_samples: int
    num_events: int
    elapsed_s: float


def simulator_rate(arm: str, launch: int, workload: Workload, steps: int) -> Rate:
    """One run of an arm of `bench.shaping`, in seconds of processor time."""
    config = ARMS[arm].config(launch, MAX_NEW_TOKENS, steps * 32, seed=0)
    begin_s = time.process_time()
    result = simulate(config, workload, ARMS[arm].models(), num_prompts=NUM_PROMPTS)
    return Rate(result.num_samples, result.num_events, time.process_time() - begin_s)


class Cluster:
    """Peers that answer at once and cost the shaper what real ones would; `beat` lets one generator report once.

    Lengths are geometric, so that the samples in flight are alike at any time: what is measured is the steady state.
    """

    def __init__(self, num_in_flight: int, ledger: LedgerWriter) -> None:
        self._slots = max(num_in_flight // GENERATORS, 1)
        groups_per_step = max(num_in_flight // MAX_STALENESS, 1)  # wide enough that no straggler closes the window
        config = RunConfig.model_validate(
            {
                "learner": {"steps": 1_000_000, "groups_per_step": groups_per_step},
                "shaping": {"rule": "survivor", "keep": 8, "launch": LAUNCH, "shortest": 7, "longest": 1},
                "staleness": {"max_staleness": MAX_STALENESS},
                "generator": {"num_slots": self._slots, "max_queued": 0, "max_context_tokens": 1 << 20},
                "sampling": {"max_new_tokens": 1 << 16},  # more than any sample has
                "evaluation": {"samples_per_prompt": 0},
            }
        )
        token_ids = np.zeros(1, np.int32)
        prompts = tuple(Prompt(i, "", token_ids, "") for i in range(NUM_PROMPTS))
        self.state = ShaperState(config, ShuffledPrompts(prompts, seed=0), ())
        self.ledger = ledger
        self.num_ended = 0
        self.spent_s = self.checking_s = self.recording_s = 0.0
        self.num_events = 0
        self._boundary = Boundary(config, ledger.path.parent)
        self.num_tokens = 0
        self._groups_per_step = groups_per_step
        self._version = 0
        self._trained: list[int] = []
        self._outbox: deque[tuple[str, Incoming]] = deque()
        self._running: dict[str, dict[int, int]] = {f"generator/{i}": {} for i in range(GENERATORS)}
        self._turn: deque[str] = deque(self._running)
        self._rng = np.random.default_rng(0)
        self._flat = np.zeros(SAMPLES_PER_MESSAGE * STEPS_PER_FLUSH, np.int32)
        self._logprobs = np.zeros(len(self._flat), np.float32)
        for peer in (*self._running, REWARD, LEARNER.first):
            self._absorb(self.state.peer_up(peer, 1, 0.0))
            self._deliver()
        assert self.state.phase is RunPhase.TRAINING

    @property
    def num_in_flight(self) -> int:
        """Samples that are being decoded."""
        return sum(map(len, self._running.values()))

    def counts(self) -> dict[str, float]:
        """All that is counted, so far."""
        return {
            "num_events": self.num_events,
            "num_tokens": self.num_tokens,
            "spent_s": self.spent_s,
            "checking_s": self.checking_s,
            "recording_s": self.recording_s,
            "num_bytes": self.ledger.num_bytes,
            "num_ended": self.num_ended,
        }

    def beat(self) -> None:
        """The next generator reports the tokens of a batch, and which samples have ended."""
        name = self._turn[0]
        self._turn.rotate()
        running = self._running[name]
        batch = [sample_id for sample_id, _ in zip(running, range(SAMPLES_PER_MESSAGE), strict=False)]
        counts = np.full(len(batch), STEPS_PER_FLUSH, np.int32)
        num_tokens = len(batch) * STEPS_PER_FLUSH
        tokens = self._flat[:num_tokens], self._logprobs[:num_tokens]
        self._feed(name, TokensDecoded(self._version, np.array(batch, np.int64), counts, *tokens))
        self.num_tokens += num_tokens
        ends = self._rng.random(len(batch)) < STEPS_PER_FLUSH / MEAN_TOKENS
        for sample_id, end in zip(batch, ends.tolist(), strict=True):
            length = running.pop(sample_id) + STEPS_PER_FLUSH
            if end:
                self._outbox.append((name, SampleFinished(sample_id, "stop", length)))
            else:
                running[sample_id] = length  # to the end of the line: everybody has a turn
        self._deliver()

    def _deliver(self) -> None:
        while self._outbox:
            self._feed(*self._outbox.popleft())

    def _feed(self, peer: str, message: Incoming) -> None:
        begin_s = time.process_time()
        refusal = self._boundary.refusal(self.state, peer, message)
        checked_s = time.process_time()
        assert refusal is None, refusal
        outputs = self.state.handle(peer, message, 0.0)
        handled_s = time.process_time()
        records = [output for output in outputs if not isinstance(output, SendTo | Forget)]
        if records:
            self.ledger.append(records)
        self.checking_s += checked_s - begin_s
        self.spent_s += handled_s - checked_s
        self.recording_s += time.process_time() - handled_s
        self.num_ended += sum(isinstance(record, SampleEnded) for record in records)
        self.num_events += 1
        self._absorb(outputs)

    def _absorb(self, outputs: list[Output]) -> None:
        for output in outputs:
            if isinstance(output, SendTo):
                self._answer(output.peer, output.message)

    def _answer(self, peer: str, message: object) -> None:
        say = self._outbox.append
        match message:
            case Generate(sample_id=sample_id):
                self._running[peer][sample_id] = 0
            case Cancel(sample_id=sample_id):
                if sample_id in self._running[peer]:
                    say((peer, SampleCancelled(sample_id, self._running[peer].pop(sample_id))))
            case Score(sample_id=sample_id):
                say((peer, SampleScored(sample_id, float(sample_id % 3 == 0))))
            case TrainGroup(group_id=group_id):
                self._trained.append(group_id)
                if len(self._trained) == self._groups_per_step:
                    self._learn()
            case Greet(number=number) if peer in self._running:
                say((peer, GeneratorReady(number, self._slots, 1 << 20)))
                say((peer, WeightsApplied(0, 0.0)))
            case Greet():
                say((peer, RewardReady(1) if peer == REWARD else LearnerReady(0)))

    def _learn(self) -> None:
        self._outbox.append((LEARNER.first, GroupsCommitted(self._version, np.array(self._trained, np.int64))))
        self._trained.clear()
        self._version += 1
        self._outbox.extend((name, WeightsApplied(self._version, 0.0)) for name in self._running)
        self._outbox.append((LEARNER.first, VersionPublished(self._version)))
        self._outbox.append((LEARNER.first, VersionSaved(self._version, self._version)))


@dataclass(frozen=True)
class Load:
    """What the state machine took with so many samples in flight."""

    num_in_flight: int
    num_groups: int
    num_events: int
    num_tokens: int
    spent_s: float
    checking_s: float
    recording_s: float
    bytes_per_sample: float
    """Of the ledger; not a number if no sample has ended."""

    @property
    def tokens_per_s(self) -> float:
        """Streamed tokens that a core takes in."""
        return self.num_tokens / self.spent_s


def state_machine_load(num_in_flight: int, seconds: float) -> Load:
    """Steady state for so many seconds of the state machine's processor time, after a fifth of that to settle."""
    with tempfile.TemporaryDirectory() as home:
        ledger = LedgerWriter(Path(home) / LEDGER_FILE)
        cluster = Cluster(num_in_flight, ledger)
        while cluster.spent_s < seconds / 5:
            cluster.beat()
        before = cluster.counts()
        while cluster.spent_s - before["spent_s"] < seconds:
            cluster.beat()
        ledger.close()
    spent = {name: count - before[name] for name, count in cluster.counts().items()}
    return Load(
        cluster.num_in_flight,
        len(cluster.state.work.groups),
        int(spent["num_events"]),
        int(spent["num_tokens"]),
        spent["spent_s"],
        spent["checking_s"],
        spent["recording_s"],
        spent["num_bytes"] / spent["num_ended"] if spent["num_ended"] else math.nan,
    )


@dataclass(frozen=True)
class Simulated:
    """All runs of an arm on a workload."""

    workload: str
    arm: str
    launch: int
    rates: list[Rate]


def simulated(trace: Path | None, steps: int, repeats: int) -> list[Simulated]:
    """Some arms on the trace, if there is one, and on lognormal lengths."""
    workloads: dict[str, Workload] = {"math": LognormalWorkload()}
    if trace is not None:
        workloads = {trace.stem: TraceWorkload(trace)} | workloads
    return [
        Simulated(name, arm, launch, [simulator_rate(arm, launch, workload, steps) for _ in range(repeats)])
        for name, workload in workloads.items()
        for arm, launch in (("dual_end", 10), ("survivor", 12), ("darts", 12))
    ]


def simulator_table(found: list[Simulated]) -> list[str]:
    """Markdown rows."""
    rows = []
    for each in found:
        elapsed_s, best_s = median(r.elapsed_s for r in each.rates), min(r.elapsed_s for r in each.rates)
        samples, events = each.rates[0].num_samples, each.rates[0].num_events
        rows.append(
            [
                each.workload,
                f"{each.arm}, R = {each.launch}",
                f"{samples:,}",
                f"{elapsed_s / samples * 1e6:.0f} (best {best_s / samples * 1e6:.0f})",
                f"{samples / elapsed_s * 60 / 1e6:.2f} (best {samples / best_s * 60 / 1e6:.2f})",
                f"{elapsed_s / events * 1e6:.0f}",
            ]
        )
    titles = ("workload", "arm", "samples", "us / sample", "million samples / minute", "us / event")
    return table(titles, rows)


def load_table(loads: list[Load]) -> list[str]:
    """Markdown rows: one for each number of samples in flight."""
    rows = [
        [
            f"{load.num_in_flight:,}",
            f"{load.num_groups:,}",
            f"{load.num_events / load.spent_s:,.0f}",
            f"{load.spent_s / load.num_events * 1e6:.0f}",
            f"{load.tokens_per_s / 1e6:.1f}",
            f"{load.checking_s / load.num_events * 1e6:.1f}",
            f"{load.recording_s / load.num_events * 1e6:.1f}",
        ]
        for load in loads
    ]
    titles = ("in flight", "open groups", "events / s", "us / event", "million tokens / s")
    return table((*titles, "check, us / event", "ledger, us / event"), rows)


def report(arguments: argparse.Namespace, runs: list[Simulated], loads: list[Load]) -> str:
    """Both tables, with how they came about."""
    return "\n".join(
        [
            "# The shaper's own speed",
            "",
            f"{conditions('shaper')} Processor time of one core; the median of {arguments.repeats} runs, and the best, "
            "because other work ran on the machine.",
            "",
            f"Simulator: {arguments.steps} steps of 32 groups, 4 generators of 128 slots.",
            "",
            *simulator_table(runs),
            "",
            f"State machine alone: survivor 7 + 1 of {LAUNCH}, {MEAN_TOKENS} tokens a sample on average, "
            f"{SAMPLES_PER_MESSAGE} samples x {STEPS_PER_FLUSH} tokens a message, {GENERATORS} generators.",
            "",
            *load_table(loads),
            "",
            f"![tokens per second over samples in flight]({PLOT})",
        ]
    )


def write(arguments: argparse.Namespace, text: str, runs: list[Simulated], loads: list[Load]) -> None:
    """The tables, the numbers and the plot, if they are wanted."""
    if arguments.out is None:
        return
    numbers = {"simulated": [asdict(each) for each in runs], "state_machine": [asdict(load) for load in loads]}
    keep(arguments.out, "shaper", text, numbers)
    panel = Panel(
        "samples in flight",
        "million streamed tokens/s per core",
        {"state machine": [(load.num_in_flight, load.tokens_per_s / 1e6) for load in loads]},
        log="x",
        levels={"goal": GOAL_TOKENS_PER_S / 1e6},
    )
    draw_curves(arguments.out / PLOT, [panel])


def main() -> None:
    """One command; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help=".npz file with lengths and rewards [num_prompts, samples]")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of a simulated run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--in-flight", nargs="+", type=int, default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--seconds", type=float, default=3.0, help="processor time for each number in flight")
    parser.add_argument("--out", type=for_plots, help="directory for shaper.md, .json and .png")
    arguments = parser.parse_args()
    try:
        runs = simulated(arguments.trace, arguments.steps, arguments.repeats)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    loads = [state_machine_load(number, arguments.seconds) for number in arguments.in_flight]
    text = report(arguments, runs, loads)
    print(text)
    write(arguments, text, runs, loads)


if __name__ == "__main__":
    main()
