"""The rules that the ledger of a run must satisfy:

    every sample that was started ends exactly once, and no other sample ends
    a group is shipped once, and is either trained on at that step or dropped
    no sample is trained on twice, is held out, or has a token that is older than the bound or newer than the step
    a sample is only given to a generator that has acknowledged the newest published version; no token that is trained
      on is older than what its generator had acknowledged, nor than the floor of its group
    steps follow one another; a learner that returns to a version undoes the later steps: in the surviving history no
      group is in two steps, and each group is in the step that it was shipped for
    in a finished run each step used its complete number of samples, and exactly the groups that count as trained on are
      in the surviving history

The checks are pure, over records in order. A torn last record is ignored, because nothing has acted on it.

A ledger that has lost records which no other file has continues with their sums (`BroughtForward`). The part before is
audited as that of a run that ended there; the part after begins with the sums.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from darts_async.config import RunConfig
from darts_async.protocol import group_id_of, sample_id_of
from darts_async.shaper.ledger import (
    AnyRecord,
    BroughtForward,
    GroupDropped,
    GroupOpened,
    GroupShipped,
    LearnerRewound,
    RunReopened,
    SampleEnded,
    SamplePlaced,
    StepCommitted,
    VersionSeen,
    WeightsAcknowledged,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that was broken, and the ids that break it."""

    rule: str
    ids: tuple[int, ...]
    """Ids of samples, groups or steps, depending on the rule."""


NOTHING_BROUGHT = BroughtForward(0, 0, 0, {}, {})


@dataclass(slots=True)
class Books:
    """The records of a ledger, sorted by subject."""

    brought: BroughtForward = NOTHING_BROUGHT
    """The sums of earlier records that are lost."""
    before: "Books | None" = None
    """The remaining records of the part before the loss."""
    opened: dict[int, GroupOpened] = field(default_factory=dict)
    shipped: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """The steps that each group was shipped for."""
    dropped: set[int] = field(default_factory=set)
    endings: defaultdict[int, list[SampleEnded]] = field(default_factory=lambda: defaultdict(list))
    opened_twice: set[int] = field(default_factory=set)
    history: list[tuple[int, ...]] = field(default_factory=list)
    """The groups of each step that no rewind has undone."""
    out_of_order: list[int] = field(default_factory=list)
    """Steps that did not follow the previous one, and versions to which the learner returned and that never existed."""
    published: int = -1
    """The newest policy version."""
    acknowledged: dict[tuple[str, int], int] = field(default_factory=dict)
    """The version that each incarnation of a generator has acknowledged."""
    oldest_of: dict[int, int] = field(default_factory=dict)
    """The oldest version under which each sample can have been decoded, by its generators."""
    placed_behind: list[int] = field(default_factory=list)
    """Samples given to a generator without the newest published version."""

    @classmethod
    def of(cls, records: Iterable[AnyRecord]) -> "Books":
        books = cls()
        for record in records:
            match record:
                case GroupOpened(group_id=group_id):
                    if group_id in books.opened:
                        books.opened_twice.add(group_id)
                    books.opened[group_id] = record
                case GroupShipped(group_id=group_id, step=step):
                    books.shipped[group_id].append(step)
                case GroupDropped(group_id=group_id):
                    books.dropped.add(group_id)
                case SampleEnded(sample_id=sample_id):
                    books.endings[sample_id].append(record)
                case SamplePlaced():
                    books._take_placement(record)
                case WeightsAcknowledged(generator=name, incarnation=incarnation, policy_version=version):
                    books.acknowledged[name, incarnation] = version
                case VersionSeen(policy_version=version):
                    books.published = max(books.published, version)
                case RunReopened(num_steps=num_steps):
                    books.published = min(books.published, num_steps)
                case BroughtForward():
                    books = cls(record, before=books, history=[()] * record.num_steps, published=books.published)
                case StepCommitted(step=step) | LearnerRewound(policy_version=step):
                    books._take_history(step, record)
        return books

    def _take_history(self, step: int, record: StepCommitted | LearnerRewound) -> None:
        if isinstance(record, LearnerRewound):
            if step >= len(self.history):
                self.out_of_order.append(step)
            del self.history[step:]
        elif step == len(self.history):
            self.history.append(record.group_ids)
        else:
            self.out_of_order.append(step)

    def _take_placement(self, record: SamplePlaced) -> None:
        version = self.acknowledged.get((record.generator, record.incarnation), -1)
        self.oldest_of[record.sample_id] = min(version, self.oldest_of.get(record.sample_id, version))
        if version < max(self.published, 0):
            self.placed_behind.append(record.sample_id)

    def knows(self, group_id: int) -> bool:
        return group_id >= self.brought.next_group_id

    @property
    def drawn(self) -> set[int]:
        groups = self.opened.items()
        return {sample_id_of(group_id, index) for group_id, group in groups for index in range(group.num_samples)}

    def ended(self) -> Iterator[SampleEnded]:
        return (record for records in self.endings.values() for record in records)

    def trained(self) -> Iterator[SampleEnded]:
        return (record for record in self.ended() if record.outcome == "trained")


def audit(books: Books, config: RunConfig, *, is_over: bool, num_steps: int | None) -> list[Finding]:
    """The broken rules. `is_over`: every sample must have ended. `num_steps`: steps of a finished run; else None."""
    findings = [
        *(audit(books.before, config, is_over=False, num_steps=None) if books.before is not None else []),
        Finding("groups opened twice", tuple(books.opened_twice)),
        Finding("samples that ended and were never started", tuple(books.endings.keys() - books.drawn)),
        Finding("samples that ended more than once", _many(books.endings)),
        Finding("groups shipped more than once", _many(books.shipped)),
        Finding("groups shipped and dropped", tuple(books.shipped.keys() & books.dropped)),
        Finding("samples given to a generator without the newest published version", tuple(books.placed_behind)),
        *_training(books, config.staleness.max_staleness),
        *_history(books),
        *([Finding("samples that never ended", tuple(books.drawn - books.endings.keys()))] if is_over else []),
    ]
    if num_steps is not None:
        per_step = config.learner.groups_per_step * config.shaping.keep
        findings.append(Finding(f"steps that did not use {per_step} samples", _uneven(books, num_steps, config)))
        findings.append(
            Finding("groups trained on according to their samples or to the steps, but not both", tuple(_apart(books)))
        )
    return [Finding(found.rule, tuple(sorted(found.ids))) for found in findings if found.ids]


def _training(books: Books, max_staleness: int) -> Iterator[Finding]:
    ids: defaultdict[str, list[int]] = defaultdict(list)
    for record in books.trained():
        for rule in _wrong_with(record, books, max_staleness):
            ids[rule].append(record.sample_id)
    for rule, sample_ids in ids.items():
        yield Finding(rule, tuple(sample_ids))


def _wrong_with(record: SampleEnded, books: Books, max_staleness: int) -> Iterator[str]:
    step, oldest, newest = record.step, record.oldest_version, record.newest_version
    group_id = group_id_of(record.sample_id)
    if step is None or oldest is None or newest is None:
        yield "samples trained on without a step or without tokens"
        return
    if books.shipped.get(group_id) != [step]:
        yield "samples trained on at another step than their group was shipped for"
    if step - oldest > max_staleness:
        yield f"samples trained on with a token more than {max_staleness} versions old"
    if not oldest <= newest <= step:
        yield "samples trained on before their tokens can have been decoded"
    if oldest < books.oldest_of.get(record.sample_id, step + 1):
        yield "samples decoded under a version older than their generator had acknowledged"
    group = books.opened.get(group_id)
    if group is not None and oldest < group.floor:
        yield "samples decoded under a version older than the floor of their group"
    if group is not None and group.purpose != "train":
        yield "samples trained on although their prompts are held out"


def _history(books: Books) -> Iterator[Finding]:
    counts = Counter(group_id for group_ids in books.history for group_id in group_ids)
    placed = [(group_id, step) for step, group_ids in enumerate(books.history) for group_id in group_ids]
    yield Finding("steps out of order", tuple(books.out_of_order))
    yield Finding("groups trained on twice in the surviving history", tuple(g for g, n in counts.items() if n > 1))
    yield Finding(
        "groups in the gradient of a step that they were not shipped for",
        tuple(g for g, step in placed if books.knows(g) and step not in books.shipped.get(g, ())),
    )


def _apart(books: Books) -> set[int]:
    """Groups that were trained on according to their samples and not to the steps, or the reverse."""
    by_samples = {(group_id_of(record.sample_id), record.step) for record in books.trained()}
    by_steps = {(group_id, step) for step, group_ids in enumerate(books.history) for group_id in group_ids}
    return {group_id for group_id, _ in by_samples ^ by_steps if books.knows(group_id)}


def _many(lists: dict[int, list[SampleEnded]] | dict[int, list[int]]) -> tuple[int, ...]:
    return tuple(key for key, entries in lists.items() if len(entries) > 1)


def _uneven(books: Books, num_steps: int, config: RunConfig) -> tuple[int, ...]:
    """Steps with a wrong number or size of groups. A group in which rewards failed may be smaller."""
    sizes = Counter((record.step, group_id_of(record.sample_id)) for record in books.trained())
    without_reward = {group_id_of(r.sample_id) for r in books.ended() if r.reason.startswith("reward_")}
    groups, odd = Counter[int](), set[int]()
    for (step, group_id), size in sizes.items():
        if step is not None:
            fewest = config.shaping.smallest_group if group_id in without_reward else config.shaping.keep
            groups[step] += 1
            odd |= set() if fewest <= size <= config.shaping.keep else {step}
    wanted = dict.fromkeys(range(num_steps), config.learner.groups_per_step)
    odd |= {step for step in {*groups, *wanted} if groups[step] != wanted.get(step, 0)}
    return tuple(odd - {*range(books.brought.num_steps)})
