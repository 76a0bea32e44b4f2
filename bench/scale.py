"""Where does the system saturate as the cluster grows? Simulated, from 8 to 1,024 accelerators.

    python -m bench.scale [--accelerators 8 32 128 512 1024] [--workload heavy] [--arm shortest] [--steps 20]

The real shaper on a virtual clock (see `darts_async.simulation`), with the accelerators of `bench.profiles`, half of
which decode and half of which train. Weak scaling: groups per step grow with the cluster. Strong scaling: they stay
what they are. Then what an event costs with each way to shape, of which none may take longer as the cluster grows; and
the arithmetic of what one shaper and its links would have to bear, with the state machine's time per message measured
here, on one core, at the number of samples in flight of each cluster.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.charts import Panel, draw_curves, for_plots
from bench.profiles import PROFILES, Profile
from bench.results import conditions, keep, table
from bench.shaper import SAMPLES_PER_MESSAGE, STEPS_PER_FLUSH, state_machine_load
from bench.shaping import ARMS, KEEP, MAX_NEW_TOKENS, SYNTHETIC, from_trace
from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.simulation.demand import Workload
from darts_async.simulation.models import EngineModel, LearnerModel, Models
from darts_async.simulation.report import SimulationResult
from darts_async.simulation.run import simulate

LAUNCH = 12
GROUPS_PER_ACCELERATOR = 4
STRONG_GROUPS = 512
"""Of strong scaling: enough for 128 accelerators."""
BYTES_PER_TOKEN = 8
"""Of `TokensDecoded`: an int32 and a float32. What a message and a sample cost on top is below a tenth of that."""
NUM_PROMPTS = 8192
MEASURED_S = 1.0
COMPARED = (
    *("asynchronous", "asynchronous, tail batching", "shortest", "darts", "survivor", "survivor, utility"),
    *("dual_end + hazard", "qlpo"),
)
COMPARED_STEPS = 6
PLOT = "scale.png"


@dataclass(frozen=True, slots=True)
class Point:
    """One cluster."""

    num_accelerators: int
    groups_per_step: int
    result: SimulationResult
    processor_s: float
    """Of the whole simulation, peers included."""

    @property
    def groups_per_s(self) -> float:
        """Trained."""
        return self.result.num_trained_groups / self.result.makespan_s

    @property
    def event_s(self) -> float:
        """Processor time of one message to the shaper, peers included."""
        return self.processor_s / self.result.num_events

    @property
    def busy(self) -> float:
        """Of a core, if all this went on in real time."""
        return self.processor_s / self.result.makespan_s


def profile_of(num_accelerators: int) -> Profile:
    """Half decode, half train; the optimiser step and the broadcast do not grow (a tree, in a ring's time)."""
    half = num_accelerators // 2
    nearest = max((number for number in PROFILES if number <= num_accelerators), default=min(PROFILES))
    return replace(PROFILES[nearest], num_generators=half, num_training=half)


def simulated(num_accelerators: int, groups_per_step: int, arm: str, workload: Workload, cap: int, steps: int) -> Point:
    """A run of so many steps."""
    profile, chosen = profile_of(num_accelerators), ARMS[arm]
    config = RunConfig.model_validate(
        {
            "shaping": {"keep": KEEP, "launch": chosen.launch or LAUNCH, **chosen.shaping},
            "staleness": {"max_staleness": chosen.max_staleness},
            "learner": {"steps": steps, "groups_per_step": groups_per_step},
            "generator": {"num_slots": profile.num_slots, "max_context_tokens": 1 << 16},
            "sampling": {"max_new_tokens": cap},
            "evaluation": {"samples_per_prompt": 0},
            "roles": {"generator": {"replicas": profile.num_generators}},
        }
    )
    engine = EngineModel(
        token_latency_s=profile.token_latency_s,
        batch_for_double_latency=profile.batch_for_double_latency,
        update_stall_s=profile.update_stall_s,
        flush_every_s=chosen.flush_every_s,
    )
    learner = LearnerModel(step_s=profile.step_s, token_s=profile.token_s, broadcast_s=profile.broadcast_s)
    began_s = time.process_time()
    result = simulate(config, workload, Models(engine, 0.05, learner), num_prompts=NUM_PROMPTS)
    return Point(num_accelerators, groups_per_step, result, time.process_time() - began_s)


def efficiency(point: Point, first: Point) -> float:
    """Groups per second and accelerator, as a share of those of the smallest cluster."""
    return point.groups_per_s / first.groups_per_s * first.num_accelerators / point.num_accelerators


def scaling_table(points: list[Point]) -> list[str]:
    """One row for each cluster."""
    titles = (
        *("accelerators", "groups / step", "s / step", "groups / s", "efficiency", "generator idle", "slots used"),
        *("learner idle", "staleness max", "processor s"),
    )
    rows = []
    for point in points:
        result = point.result
        rows.append(
            [
                f"{point.num_accelerators:,}",
                f"{point.groups_per_step:,}",
                f"{point.groups_per_step / point.groups_per_s:.1f}",
                f"{point.groups_per_s:.2f}",
                f"{efficiency(point, points[0]):.0%}",
                f"{result.generator_idle_share:.1%}",
                f"{result.slot_use:.0%}",
                f"{result.learner_idle_share:.1%}",
                f"{result.staleness_max}",
                f"{point.processor_s:.0f}",
            ]
        )
    return table(titles, rows)


def arms_table(arms: dict[str, list[Point]]) -> list[str]:
    """One row for each arm, of the same clusters."""
    numbers = [point.num_accelerators for point in next(iter(arms.values()))]
    titles = (
        "arm",
        *(f"us / event, {number:,} accelerators" for number in numbers),
        *(f"share of a core, {number:,}" for number in numbers),
    )
    rows = [
        [arm, *(f"{point.event_s * 1e6:.0f}" for point in points), *(f"{point.busy:.1%}" for point in points)]
        for arm, points in arms.items()
    ]
    return table(titles, rows)


@dataclass(frozen=True, slots=True)
class Burden:
    """What streaming every token to one shaper would take, with all slots in use."""

    num_accelerators: int
    num_in_flight: int
    tokens_per_s: float
    messages_per_s: float
    message_s: float
    """Of the state machine, measured."""
    num_generators: int

    @property
    def busy(self) -> float:
        """Of a core."""
        return self.messages_per_s * self.message_s


def burden_of(number: int) -> Burden:
    """Of a cluster of so many."""
    profile = profile_of(number)
    in_flight = profile.num_generators * profile.num_slots
    load = state_machine_load(in_flight, MEASURED_S)
    messages_per_s = profile.decoded_per_s / (SAMPLES_PER_MESSAGE * STEPS_PER_FLUSH)
    message_s = load.spent_s / load.num_events
    return Burden(number, in_flight, profile.decoded_per_s, messages_per_s, message_s, profile.num_generators)


def load_table(burdens: list[Burden]) -> list[str]:
    """One row for each cluster."""
    titles = (
        *("accelerators", "samples in flight", "million tokens / s", "messages / s", "us / message"),
        *("shaper, share of a core", "into the shaper, MB/s", "generators per core"),
    )
    rows = [
        [
            f"{each.num_accelerators:,}",
            f"{each.num_in_flight:,}",
            f"{each.tokens_per_s / 1e6:.2f}",
            f"{each.messages_per_s:,.0f}",
            f"{each.message_s * 1e6:.0f}",
            f"{each.busy:.0%}",
            f"{each.tokens_per_s * BYTES_PER_TOKEN / 1e6:.1f}",
            f"{each.num_generators / each.busy:,.0f}",
        ]
        for each in burdens
    ]
    return table(titles, rows)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Everything that was found."""

    weak: list[Point]
    strong: list[Point]
    arms: dict[str, list[Point]]
    burdens: list[Burden]


def run(arguments: argparse.Namespace) -> Scaled:
    """All clusters. Raises `ConfigError`."""
    make, cap = SYNTHETIC[arguments.workload]
    if arguments.trace:
        make, cap = (lambda seed, number: from_trace(arguments.trace, seed, number)), MAX_NEW_TOKENS
    workload = make(0, NUM_PROMPTS)

    def point(number: int, groups_per_step: int, arm: str = arguments.arm, steps: int = arguments.steps) -> Point:
        print(f"{arm}: {number} accelerators, {groups_per_step} groups per step", file=sys.stderr)
        return simulated(number, groups_per_step, arm, workload, cap, steps)

    numbers = arguments.accelerators
    compared = sorted({numbers[0], numbers[len(numbers) // 2]})
    return Scaled(
        [point(number, GROUPS_PER_ACCELERATOR * number) for number in numbers],
        [point(number, STRONG_GROUPS) for number in numbers],
        {
            arm: [point(number, GROUPS_PER_ACCELERATOR * number, arm, COMPARED_STEPS) for number in compared]
            for arm in COMPARED
        },
        [burden_of(number) for number in numbers],
    )


def report(arguments: argparse.Namespace, found: Scaled) -> str:
    """All tables."""
    return "\n".join(
        [
            "# Scaling, simulated",
            "",
            f"{conditions('scale')} Arm `{arguments.arm}`, {LAUNCH} samples for {KEEP}; {arguments.steps} steps, the "
            "first of which fill the pipeline. Efficiency: groups per second and accelerator, as a share of those of "
            "the smallest cluster.",
            "",
            f"![efficiency, and what one shaper bears]({PLOT})",
            "",
            f"## Weak: {GROUPS_PER_ACCELERATOR} groups per accelerator and step",
            "",
            *scaling_table(found.weak),
            "",
            f"## Strong: {STRONG_GROUPS} groups per step",
            "",
            *scaling_table(found.strong),
            "",
            f"## Every way to shape: processor time of {COMPARED_STEPS} steps of weak scaling, peers included",
            "",
            *arms_table(found.arms),
            "",
            f"## One shaper: a message per generator every {STEPS_PER_FLUSH} decode steps, every token in it",
            "",
            *load_table(found.burdens),
        ]
    )


def write(arguments: argparse.Namespace, text: str, found: Scaled) -> None:
    """The tables, the numbers and the plot, if they are wanted."""
    if arguments.out is None:
        return
    numbers = {
        "arm": arguments.arm,
        "steps": arguments.steps,
        "weak": [numbers_of(point) for point in found.weak],
        "strong": [numbers_of(point) for point in found.strong],
        "arms": {arm: [numbers_of(point) for point in points] for arm, points in found.arms.items()},
        "one_shaper": [asdict(each) for each in found.burdens],
    }
    keep(arguments.out, "scale", text, numbers)
    curves = {
        name: [(point.num_accelerators, efficiency(point, points[0])) for point in points]
        for name, points in (("weak", found.weak), ("strong", found.strong))
    }
    busy = [(each.num_accelerators, each.busy) for each in found.burdens]
    draw_curves(
        arguments.out / PLOT,
        [
            Panel("accelerators", "efficiency", curves, log="x"),
            Panel("accelerators", "share of a core", {"one shaper": busy}, log="xy", levels={"a core": 1.0}),
        ],
    )


def numbers_of(point: Point) -> dict[str, float]:
    """What a table is made of."""
    result = point.result
    return {
        "accelerators": point.num_accelerators,
        "groups_per_step": point.groups_per_step,
        "groups_per_s": point.groups_per_s,
        "generator_idle": result.generator_idle_share,
        "slots_used": result.slot_use,
        "learner_idle": result.learner_idle_share,
        "staleness_max": result.staleness_max,
        "processor_s": point.processor_s,
        "event_s": point.event_s,
        "busy": point.busy,
    }


def main() -> None:
    """One command; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerators", nargs="+", type=int, default=[8, 32, 128, 512, 1024])
    parser.add_argument("--workload", choices=SYNTHETIC, default="heavy")
    parser.add_argument("--trace", type=Path, help=".npz file with lengths and rewards, in place of the workload")
    parser.add_argument("--arm", choices=ARMS, default="shortest")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=for_plots, help="directory for scale.md, .json and .png")
    arguments = parser.parse_args()
    if min(arguments.accelerators) < 2:
        parser.error(f"--accelerators {min(arguments.accelerators)}: one decodes and one trains, so at least 2")
    try:
        found = run(arguments)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    text = report(arguments, found)
    print(text)
    write(arguments, text, found)


if __name__ == "__main__":
    main()
