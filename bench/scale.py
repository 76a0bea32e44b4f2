"""Where does the system saturate as the cluster grows? Simulated, from 8 to 1,024 accelerators.

    python -m bench.scale [--accelerators 8 32 128 512 1024] [--workload heavy] [--arm shortest] [--steps 20]

The real shaper on a virtual clock (see `darts_async.simulation`), with the accelerators of `bench.profiles`, half of
which decode and half of which train. Weak scaling: groups per step grow with the cluster. Strong scaling: they stay
what they are. Beside it the arithmetic of what one shaper and its links would have to bear, with the state machine's
time per message measured here, on one core, at the number of samples in flight of each cluster.
"""

import argparse
import os
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from bench.measured import called
from bench.profiles import PROFILES, Profile
from bench.shaper import SAMPLES_PER_MESSAGE, STEPS_PER_FLUSH, state_machine_load
from bench.shaping import ARMS, KEEP, MAX_NEW_TOKENS, SYNTHETIC, commit, from_trace
from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.simulation import EngineModel, LearnerModel, Models, RewardModel, SimulationResult, Workload, simulate

LAUNCH = 12
GROUPS_PER_ACCELERATOR = 4
STRONG_GROUPS = 512
"""Of strong scaling: enough for 128 accelerators."""
BYTES_PER_TOKEN = 8
"""Of `TokensDecoded`: an int32 and a float32. What a message and a sample cost on top is below a tenth of that."""
NUM_PROMPTS = 8192
MEASURED_S = 1.0


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
            "staleness": {"max_staleness": chosen.max_staleness, "cut_after_s": 1e9},
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
    )
    learner = LearnerModel(step_s=profile.step_s, token_s=profile.token_s, broadcast_s=profile.broadcast_s)
    began_s = time.process_time()
    result = simulate(config, workload, Models(engine, RewardModel(latency_s=0.05), learner), num_prompts=NUM_PROMPTS)
    return Point(num_accelerators, groups_per_step, result, time.process_time() - began_s)


def scaling_table(points: list[Point]) -> list[str]:
    """Efficiency is groups per second and accelerator, as a share of that of the first row."""
    rows = [
        "| accelerators | groups / step | s / step | groups / s | efficiency | generator idle | slots used "
        "| learner idle | staleness max | processor s |",
        "|" + "---|" * 10,
    ]
    first = points[0]
    for point in points:
        share = point.groups_per_s / first.groups_per_s * first.num_accelerators / point.num_accelerators
        result = point.result
        rows.append(
            f"| {point.num_accelerators:,} | {point.groups_per_step:,} | "
            f"{point.groups_per_step / point.groups_per_s:.1f} | {point.groups_per_s:.2f} | {share:.0%} "
            f"| {result.generator_idle_share:.1%} | {result.slot_use:.0%} | {result.learner_idle_share:.1%} "
            f"| {result.staleness_max} | {point.processor_s:.0f} |"
        )
    return rows


def load_table(numbers: list[int]) -> list[str]:
    """What streaming every token to one shaper would take, with all slots in use."""
    rows = [
        "| accelerators | samples in flight | million tokens / s | messages / s | us / message "
        "| shaper, share of a core | into the shaper, MB/s | generators per core |",
        "|" + "---|" * 8,
    ]
    for number in numbers:
        profile = profile_of(number)
        in_flight = profile.num_generators * profile.num_slots
        load = state_machine_load(in_flight, MEASURED_S)
        message_s = load.spent_s / load.num_events
        messages = profile.decoded_per_s / (SAMPLES_PER_MESSAGE * STEPS_PER_FLUSH)
        busy = messages * message_s
        rows.append(
            f"| {number:,} | {in_flight:,} | {profile.decoded_per_s / 1e6:.2f} | {messages:,.0f} "
            f"| {message_s * 1e6:.0f} | {busy:.0%} | {profile.decoded_per_s * BYTES_PER_TOKEN / 1e6:.1f} "
            f"| {profile.num_generators / busy:,.0f} |"
        )
    return rows


def report(arguments: argparse.Namespace) -> str:
    """All tables."""
    make, cap = SYNTHETIC[arguments.workload]
    if arguments.trace:
        make, cap = (lambda seed, number: from_trace(arguments.trace, seed, number)), MAX_NEW_TOKENS
    workload = make(0, NUM_PROMPTS)
    numbers = arguments.accelerators
    weak = [
        simulated(number, GROUPS_PER_ACCELERATOR * number, arguments.arm, workload, cap, arguments.steps)
        for number in numbers
    ]
    strong = [simulated(number, STRONG_GROUPS, arguments.arm, workload, cap, arguments.steps) for number in numbers]
    return "\n".join(
        [
            "# Scaling, simulated",
            "",
            f"`{called('bench.scale')}`, commit {commit()}, {os.cpu_count()} cores "
            f"({platform.machine()}), Python {platform.python_version()}. Arm `{arguments.arm}`, {LAUNCH} samples for "
            f"{KEEP}; {arguments.steps} steps, the first of which fill the pipeline.",
            "",
            f"## Weak: {GROUPS_PER_ACCELERATOR} groups per accelerator and step",
            "",
            *scaling_table(weak),
            "",
            f"## Strong: {STRONG_GROUPS} groups per step",
            "",
            *scaling_table(strong),
            "",
            f"## One shaper: a message per generator every {STEPS_PER_FLUSH} decode steps, every token in it",
            "",
            *load_table(numbers),
            "",
        ]
    )


def main() -> None:
    """One command; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerators", nargs="+", type=int, default=[8, 32, 128, 512, 1024])
    parser.add_argument("--workload", choices=SYNTHETIC, default="heavy")
    parser.add_argument("--trace", type=Path, help=".npz file with lengths and rewards, in place of the workload")
    parser.add_argument("--arm", choices=ARMS, default="shortest")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="directory for scale.md")
    arguments = parser.parse_args()
    if min(arguments.accelerators) < 2:
        parser.error(f"--accelerators {min(arguments.accelerators)}: one decodes and one trains, so at least 2")
    try:
        text = report(arguments)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "scale.md").write_text(text)


if __name__ == "__main__":
    main()
