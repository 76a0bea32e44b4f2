"""Plans the faults of a run from a seed, before it begins. Times are seconds of the virtual clock."""

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from darts_async.config import RunConfig
from darts_async.topology.roles import GENERATOR, LEARNER, REWARD, SHAPER

LastMoment = Literal["", "last step taken", "model written", "end told"]
Loss = Literal["nothing", "unflushed", "anything"]


@dataclass(frozen=True, slots=True)
class Blow:
    """Something that is done to a process at a time."""

    at_s: float
    kind: str
    """`kill`, `freeze`, `cut`, or `outage`: all processes and the launcher die at once, and the run is resumed."""
    victim: str
    lasts_s: float = 0.0
    """How long it is frozen or cut off."""
    other: str = ""
    """Whom it is cut off from."""


@dataclass(frozen=True, slots=True)
class DiskFull:
    """No file grows for a while."""

    at_s: float
    lasts_s: float


@dataclass(frozen=True, slots=True)
class Hardship:
    """Faults of the disk and of the launcher, and processes that send invalid messages. They are drawn from a stream of
    their own, so that the other draws of a seed do not depend on them."""

    outages_at_s: tuple[float, ...]
    """More outages than the blows of the plan."""
    starts_slowly: bool
    """A process begins a while after it was started, as one does that imports."""
    outage_while_starting: float
    """Probability that the launcher and all it has started die again within half a second of a start."""
    last_moment: LastMoment
    """What everything dies after, once, in the last second of the run."""
    dies_after_s: float
    """So long after it."""
    loss: Loss
    """What an outage may take of journal and ledger: nothing, what was not flushed, or anything at all."""
    lies: float
    """Probability of nonsense before a message."""
    full_disks: tuple[DiskFull, ...]


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """The faults of one run."""

    seed: int
    loss: float
    """Share of the frames that never arrive."""
    duplication: float
    lateness: float
    """Share of the frames that are up to `late_by_s` late, so that others overtake them."""
    late_by_s: float
    latency_s: float
    crash: float
    """Probability to die at each passing of a named point."""
    broken_broadcasts: float
    hung_broadcasts: float
    wrong_checksums: float
    blows: tuple[Blow, ...]
    calm_after_s: float
    """From then on nothing fails any more, and the run has to end."""
    stop_at_s: float | None
    """When the run is stopped, if it is."""
    is_resumed: bool
    """Whether it is resumed after a stop."""
    damaged_checkpoints: float
    """Probability that the newest checkpoint is not whole when a learner reads it."""
    lost_checkpoints: float
    """Probability that checkpoints are removed while everything is dead."""
    sections: dict[str, Any]
    """Settings of the run."""
    hardship: Hardship


def draw_plan(seed: int) -> ChaosPlan:
    """The run of a seed."""
    rng = Random(seed)
    calm_after_s = rng.uniform(1.0, 8.0)
    sections = _sections(rng)
    names = process_names(sections)
    is_rough = rng.random() < 0.75  # else the processes die on a network that works
    return ChaosPlan(
        seed=seed,
        loss=rng.choice((0.0, 0.02, 0.1, 0.3)) if is_rough else 0.0,
        duplication=rng.choice((0.0, 0.05, 0.3)) if is_rough else 0.0,
        lateness=rng.choice((0.0, 0.05, 0.3)) if is_rough else 0.0,
        late_by_s=rng.choice((0.02, 0.2, 0.8)),
        latency_s=rng.choice((0.0005, 0.005)),
        crash=rng.choice((0.0, 0.0005, 0.003, 0.01)),
        broken_broadcasts=rng.choice((0.0, 0.1, 0.3)),
        hung_broadcasts=rng.choice((0.0, 0.05)),
        wrong_checksums=rng.choice((0.0, 0.05)),
        blows=tuple(_blow(rng, names, calm_after_s) for _ in range(rng.randrange(0, 9))),
        calm_after_s=calm_after_s,
        stop_at_s=rng.uniform(0.5, 1.2 * calm_after_s) if rng.random() < 0.2 else None,
        is_resumed=rng.random() < 0.7,
        damaged_checkpoints=rng.choice((0.0, 0.2, 0.5)),
        lost_checkpoints=rng.choice((0.0, 0.0, 0.5)),
        sections=sections | {"learner": sections["learner"] | {"keep_checkpoints": rng.randint(1, 3)}},
        hardship=draw_hardship(seed, calm_after_s),
    )


def draw_hardship(seed: int, calm_after_s: float) -> Hardship:
    """In the run of a seed."""
    rng = Random(f"hardship of {seed}")
    return Hardship(
        outages_at_s=tuple(rng.uniform(0.0, calm_after_s) for _ in range(rng.choice((0, 0, 1, 2, 4)))),
        starts_slowly=rng.random() < 0.5,
        outage_while_starting=rng.choice((0.0, 0.0, 0.3, 0.6)),
        last_moment=rng.choice(("", "", "", "last step taken", "model written", "end told")),
        dies_after_s=rng.choice((0.0, rng.uniform(0.0, 0.01), rng.uniform(0.0, 0.2))),
        loss=rng.choice(("nothing", "unflushed", "anything", "anything")),
        lies=rng.choice((0.0, 0.0, 0.0005, 0.005)),
        full_disks=tuple(
            DiskFull(rng.uniform(0.0, calm_after_s), rng.uniform(0.05, 2.0)) for _ in range(rng.choice((0, 0, 0, 1, 2)))
        ),
    )


def config_of(plan: ChaosPlan) -> RunConfig:
    """The settings of a run."""
    return RunConfig.model_validate(plan.sections)


def process_names(sections: dict[str, Any]) -> tuple[str, ...]:
    """The processes of a run."""
    replicas = {name: settings["replicas"] for name, settings in sections["roles"].items()}
    return tuple(
        name for role in (SHAPER, LEARNER, GENERATOR, REWARD) for name in role.processes(replicas.get(role.name, 1))
    )


def _blow(rng: Random, names: tuple[str, ...], until_s: float) -> Blow:
    at_s, victim = rng.uniform(0.0, until_s), rng.choice(names)
    match rng.choice(("kill",) * 7 + ("freeze",) * 3 + ("cut",) * 3 + ("outage",)):
        case "kill" | "outage" as kind:
            return Blow(at_s, kind, victim)
        case "freeze":
            return Blow(at_s, "freeze", victim, rng.uniform(0.05, 2.0))
        case _:
            other = rng.choice([name for name in names if name != victim])
            return Blow(at_s, "cut", victim, rng.uniform(0.05, 2.5), other)


def _prompts(num_train: int, held_out: int) -> dict[str, Any]:
    return {"num_train": num_train, "held_out": held_out, "max_prompt_tokens": 64}


def _sections(rng: Random) -> dict[str, Any]:
    keep = rng.randint(1, 4)
    launch = keep + rng.randint(0, 3)
    shaping: dict[str, Any] = rng.choice(
        (
            {"rule": "none", "launch": keep},
            {"rule": "random", "launch": launch},
            {"rule": "shortest", "launch": launch},
            {"rule": "dual_end", "launch": launch, "shortest": keep - keep // 2, "longest": keep // 2},
            {"rule": "survivor", "launch": launch, "shortest": keep - keep // 3, "longest": keep // 3},
        )
    )
    return {
        "seed": rng.randrange(3),
        "roles": {"generator": {"replicas": rng.randint(1, 3)}, "reward": {"replicas": rng.randint(1, 2)}},
        "prompts": _prompts(rng.choice((8, 64)), rng.randint(1, 2)),
        "sampling": {"max_new_tokens": 48},
        "shaping": shaping | {"keep": keep},
        "staleness": {"max_staleness": rng.randint(0, 3)},
        "generator": {
            "engine": "scripted",
            "num_slots": rng.choice((4, 16)),
            "max_queued": rng.randint(0, 3),
            "max_context_tokens": 192,
            "flush_every_steps": rng.randint(1, 4),
            "script": {"median_tokens": rng.choice((4.0, 12.0)), "sample_sigma": 0.6, "token_latency_s": 0.01},
        },
        "learner": {
            "steps": rng.randint(2, 8),
            "groups_per_step": rng.randint(1, 3),
            "checkpoint_every": rng.randint(1, 4),
        },
        "weights": {"deadline_s": 0.5},
        "evaluation": rng.choice(
            ({"samples_per_prompt": 0}, {"samples_per_prompt": 2, "every_steps": rng.randint(0, 3)})
        ),
        "transport": {
            "window": rng.choice((4, 64)),
            "heartbeat_s": 0.1,
            "dead_after_s": 0.6,
            "resend_after_s": 0.1,
        },
    }
