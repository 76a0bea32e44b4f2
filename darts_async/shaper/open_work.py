"""Samples on processes: which process decodes or scores each, and how each ends, exactly once.

This half of the shaper's state knows generators and reward processes; `training` and `evaluation` decide what to open,
keep and ship. Pure like them: what is to be sent and recorded goes to an `Outbox`.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from msgspec import Struct, field

from darts_async.config import RunConfig
from darts_async.prompts.source import Prompt
from darts_async.protocol import Cancel, FinishReason, Generate, SamplingParams, Score, group_id_of, sample_id_of
from darts_async.shaper.group import Group, Purpose, Sample, Stage
from darts_async.shaper.ledger import GroupOpened, SampleEnded, SamplePlaced
from darts_async.shaper.outbox import Outbox
from darts_async.shaper.rollouts import Rollouts, RolloutsState
from darts_async.shaper.rosters import GeneratorRoster, RewardRoster
from darts_async.shaper.token_accounts import Totals
from darts_async.topology.outcomes import SampleOutcome


def sample_seed(run_seed: int, sample_id: int) -> int:
    """Seed of a sample's draws: the same wherever and whenever it is decoded. 63 bits."""
    return (run_seed * 0x9E3779B97F4A7C15 + sample_id * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 63)


class OpenWorkState(Struct, frozen=True):
    """What an `OpenWork` knows between two events."""

    groups: list[Group]
    totals: Totals
    generators: GeneratorRoster = field(default_factory=GeneratorRoster)
    rewards: RewardRoster = field(default_factory=RewardRoster)
    next_group_id: int = 0
    waiting: list[int] = []
    unscored: list[int] = []
    rollouts: RolloutsState = RolloutsState()


class OpenWork:
    """The open groups, their samples, and the processes that work on them."""

    def __init__(self, config: RunConfig, outbox: Outbox, stop_token_ids: frozenset[int] = frozenset()) -> None:
        self._seed = config.seed
        self._outbox = outbox
        self.stop_token_ids = stop_token_ids
        self._sampling = SamplingParams(**config.sampling.model_dump(exclude={"stop"}))
        self.generators = GeneratorRoster()
        self.rewards = RewardRoster()
        self.rollouts = Rollouts(config)
        self.groups: dict[int, Group] = {}
        """Groups with a sample that has not ended."""
        self._samples: dict[int, Sample] = {}
        """All samples of these."""
        self.totals = Totals()
        self.next_group_id = 0
        """No group has this id or a later one."""
        self._waiting: deque[Sample] = deque()  # for room in a generator
        self._unscored: deque[Sample] = deque()  # finished while no reward process was up

    @property
    def has_room(self) -> bool:
        """Whether a sample opened now would start at once."""
        return not self._waiting and self.generators.roomiest() is not None

    def open(
        self, prompt: Prompt, purpose: Purpose, num_samples: int, *, floor: int, cursor: int, now_s: float
    ) -> Group:
        """A new group, all of whose samples wait to be placed, where no token can be older than `floor`. `cursor`: of
        the source of prompts, with this one."""
        group_id = self.next_group_id
        self.next_group_id += 1
        samples = [Sample(sample_id_of(group_id, index)) for index in range(num_samples)]
        group = self.groups[group_id] = Group(group_id, prompt, purpose, samples, floor, now_s)
        group.is_shown = self.rollouts.wants(group_id, purpose)
        self._waiting.extend(samples)
        self._samples.update((sample.sample_id, sample) for sample in samples)
        self._outbox.record(GroupOpened(group_id, prompt.prompt_id, purpose, num_samples, floor, cursor))
        return group

    def place(self) -> None:
        """Waiting samples go to generators with room; a group stays together where it fits.

        A sample never goes back to weights older than its group's floor or its own last token: versions never
        decrease along a sample, and the floor is what the staleness window relies on.
        """
        home: tuple[int, str] | None = None
        while self._waiting:
            sample = self._waiting[0]
            if sample.stage is not Stage.WAITING:
                self._waiting.popleft()
                continue
            group_id = group_id_of(sample.sample_id)
            oldest = max(self.groups[group_id].floor, sample.newest_version or 0)
            stays = home is not None and home[0] == group_id and self.generators.has_room(home[1], oldest)
            name = home[1] if stays and home is not None else self.generators.roomiest(oldest)
            if name is None:
                return
            self._waiting.popleft()
            self._start(sample, name)
            home = (group_id, name)

    def _start(self, sample: Sample, name: str) -> None:
        seat = self.generators.seats[name]
        seat.sample_ids.add(sample.sample_id)
        sample.generator = name
        sample.decoded_by.append(name)
        sample.to(Stage.DECODING)
        generate = Generate(
            sample_id=sample.sample_id,
            prompt_tokens=self.group_of(sample).prompt.token_ids,
            prefix_tokens=sample.token_ids(),
            seed=sample_seed(self._seed, sample.sample_id),
            sampling=self._sampling,
            priority=-1 if sample.num_tokens else 0,
        )
        self._outbox.record(SamplePlaced(sample.sample_id, name, seat.incarnation))
        self._outbox.send(name, generate)

    def score(self, sample: Sample) -> None:
        """Have a finished sample scored, as soon as a reward process is up."""
        peer = self.rewards.assign(sample.sample_id)
        if peer is None:
            self._unscored.append(sample)
            return
        prompt = self.group_of(sample).prompt
        assert sample.finish_reason is not None
        tokens = sample.token_ids()
        of_prompt = prompt.text, prompt.answer, prompt.metadata_json
        score = Score(sample.sample_id, *of_prompt, tokens, sample.finish_reason, prompt.reward)
        self._outbox.send(peer, score)

    def score_waiting(self) -> None:
        """A reward process may have come up."""
        while self._unscored and self.rewards.items:
            sample = self._unscored.popleft()
            if sample.stage is Stage.FINISHED:
                self.score(sample)

    def cancel(self, sample: Sample, outcome: SampleOutcome, reason: str) -> None:
        """Stop a sample that waits or decodes; it ends when the engine has acknowledged."""
        if sample.generator is None:
            self.end(sample, outcome, reason)
            return
        sample.end_outcome, sample.end_reason = outcome, reason
        sample.to(Stage.CANCELLING)
        self._outbox.send(sample.generator, Cancel(sample.sample_id))

    def end(self, sample: Sample, outcome: SampleOutcome, reason: str, step: int | None = None) -> None:
        """The one terminal event of a sample."""
        sample.to(Stage.ENDED)
        self.release(sample)
        sample.end_outcome, sample.end_reason = outcome, reason
        self.totals.ended(outcome, sample.num_tokens)
        record = SampleEnded(
            sample_id=sample.sample_id,
            outcome=outcome,
            reason=reason,
            num_tokens=sample.num_tokens,
            oldest_version=sample.oldest_version,
            newest_version=sample.newest_version,
            step=step,
            reward=sample.reward,
        )
        self._outbox.record(record)
        group = self.group_of(sample)
        group.num_ended += 1
        if not group.is_shown:
            sample.chunks = []
        if group.num_ended == len(group.samples):
            if group.is_shown:
                self.rollouts.ended(group)
            del self.groups[group.group_id]
            for ended in group.samples:
                del self._samples[ended.sample_id]

    def end_group(self, group: Group, outcome: SampleOutcome, reason: str, *, cancel_outcome: SampleOutcome) -> None:
        """End every sample of a group, the running ones by cancelling them. One that was lost before keeps its own
        end."""
        for sample in group.samples:
            if sample.stage in (Stage.WAITING, Stage.DECODING):
                self.cancel(sample, cancel_outcome, reason)
            elif sample.stage not in (Stage.CANCELLING, Stage.ENDED):
                self.end(sample, "filtered" if sample.is_lost else outcome, sample.end_reason or reason)

    def abandon_all(self, reason: str) -> None:
        """No sample continues, and no generator is waited for."""
        self.generators.owing.clear()
        for sample in self.samples():
            if sample.stage is not Stage.ENDED:
                self.end(sample, "abandoned", reason)

    def release(self, sample: Sample) -> None:
        """The sample no longer takes a place in its generator."""
        if sample.generator is not None:
            self.generators.release(sample.generator, sample.sample_id)
            sample.generator = None

    def lose(self, peer: str, *, is_gone: bool) -> list[tuple[Sample, FinishReason]]:
        """Take back what a process had: decoding continues elsewhere, scoring starts again. Returns the samples of
        which nothing is left to decode, which their generator could not report."""
        complete: list[tuple[Sample, FinishReason]] = []
        for sample_id in sorted(self.generators.leave(peer, is_gone=is_gone), reverse=True):
            sample = self.sample(sample_id)
            assert sample is not None, sample_id
            sample.generator = None
            if sample.stage is Stage.CANCELLING:
                self.end(sample, sample.end_outcome, sample.end_reason)
                continue
            sample.to(Stage.WAITING)
            reason = self._reason_to_stop(sample)
            if reason is None:
                self._waiting.appendleft(sample)
            else:
                complete.append((sample, reason))
        for sample_id in sorted(self.rewards.leave(peer)):
            sample = self.sample(sample_id)
            if sample is not None and sample.stage is Stage.FINISHED:
                self._unscored.append(sample)
        return complete

    def _reason_to_stop(self, sample: Sample) -> FinishReason | None:
        """The finish reason of a sample whose response is complete; None if it is not."""
        if not sample.chunks:
            return None
        if int(sample.chunks[-1][1][-1]) in self.stop_token_ids:
            return "stop"
        return "length" if sample.num_tokens >= self._sampling.max_new_tokens else None

    def samples(self) -> list[Sample]:
        """All samples of open groups, ended ones included."""
        return list(self._samples.values())

    def sample(self, sample_id: int) -> Sample | None:
        """A sample of an open group."""
        return self._samples.get(sample_id)

    def owned(self, peer: str, sample_id: int) -> Sample | None:
        """The sample, if this generator holds it."""
        sample = self._samples.get(sample_id)
        return sample if sample is not None and sample.generator == peer else None

    def all_owned(self, peer: str, sample_ids: Iterable[int]) -> list[Sample | None]:
        """`owned` of many: each message of tokens names some hundred."""
        find = self._samples.get
        found = [find(sample_id) for sample_id in sample_ids]
        return [sample if sample is not None and sample.generator == peer else None for sample in found]

    def group_of(self, sample: Sample) -> Group:
        """The group of a sample that has not ended."""
        return self.groups[group_id_of(sample.sample_id)]

    def to_state(self) -> OpenWorkState:
        assert self._outbox.is_empty, "between two events nothing is left to be sent"
        for sample in self._samples.values():
            sample.merge_chunks()
        return OpenWorkState(
            groups=list(self.groups.values()),
            totals=self.totals,
            generators=self.generators,
            rewards=self.rewards,
            next_group_id=self.next_group_id,
            # Samples that have been cancelled are skipped in a queue, and left out here.
            waiting=[sample.sample_id for sample in self._waiting if sample.stage is Stage.WAITING],
            unscored=[sample.sample_id for sample in self._unscored if sample.stage is Stage.FINISHED],
            rollouts=self.rollouts.to_state(),
        )

    def to_checkpoint(self) -> OpenWorkState:
        """For `restore`, where all processes are gone and no open group continues: of these, what their end will say of
        their samples."""
        groups = [
            replace(
                group,
                samples=[replace(each, generator=None, chunks=[]) for each in group.samples],
                step=None,
                is_shown=False,
            )
            for group in self.groups.values()
        ]
        return OpenWorkState(groups, self.totals, next_group_id=self.next_group_id)

    def take_peers_of(self, other: "OpenWork") -> None:
        """The same processes are up, with nothing to do."""
        self.generators, self.rewards = other.generators, other.rewards
        for sample_ids in [*(seat.sample_ids for seat in self.generators.seats.values()), *self.rewards.items.values()]:
            sample_ids.clear()
        self.next_group_id = max(self.next_group_id, other.next_group_id)  # answers of its time may come

    def restore(self, state: OpenWorkState) -> None:
        self.groups.update((group.group_id, group) for group in state.groups)
        self._samples = {sample.sample_id: sample for group in self.groups.values() for sample in group.samples}
        self.totals, self.generators, self.rewards = state.totals, state.generators, state.rewards
        self.next_group_id = state.next_group_id
        self._waiting.extend(self._samples[sample_id] for sample_id in state.waiting)
        self._unscored.extend(self._samples[sample_id] for sample_id in state.unscored)
        self.rollouts.restore(state.rollouts)

    def validate(self) -> None:
        """Samples and seats agree; every token received is in a live sample or has an outcome."""
        samples = self.samples()
        assert samples == [sample for group in self.groups.values() for sample in group.samples]
        for name, seat in self.generators.seats.items():
            held = {s.sample_id for s in samples if s.generator == name}
            assert held == seat.sample_ids, (name, held ^ seat.sample_ids)
            assert seat.room >= 0, name
        for sample in samples:
            in_generator = sample.stage in (Stage.DECODING, Stage.CANCELLING)
            assert in_generator == (sample.generator is not None), (sample.sample_id, sample.stage)
        live = sum(s.num_tokens for s in samples if s.stage is not Stage.ENDED)
        ended = sum(self.totals.tokens_by_outcome.values())
        assert live + ended == self.totals.num_tokens_received, (live, ended, self.totals.num_tokens_received)
        for group in self.groups.values():
            assert group.num_ended == sum(s.stage is Stage.ENDED for s in group.samples), group.group_id
            assert group.num_ended < len(group.samples), group.group_id
