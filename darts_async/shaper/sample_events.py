"""What generators and reward processes say of samples: tokens, ends and rewards.

Each report changes one sample and lets its group decide: a training group by its rule, a held-out one when all of its
samples are scored. A late report, of a sample that the process no longer has, changes only the count of abandoned
tokens.
"""

from darts_async.protocol import (
    Cancel,
    FinishReason,
    SampleCancelled,
    SampleFinished,
    SampleRejected,
    SampleScored,
    ScoreFailed,
    TokensDecoded,
)
from darts_async.shaper.estimates.planner import Planner
from darts_async.shaper.evaluation import Evaluation
from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.open_work import OpenWork
from darts_async.shaper.outbox import Outbox
from darts_async.shaper.training import Training

OfSamples = TokensDecoded | SampleFinished | SampleCancelled | SampleRejected | SampleScored | ScoreFailed
"""The messages that `SampleEvents` handles."""


class SampleEvents:
    """Applies reports to samples and their groups; it has no state of its own."""

    def __init__(
        self, work: OpenWork, planner: Planner, training: Training, evaluation: Evaluation, outbox: Outbox
    ) -> None:
        self._work = work
        self._planner = planner
        self._training = training
        self._evaluation = evaluation
        self._outbox = outbox

    def handle(self, peer: str, incarnation: int, message: OfSamples, now_s: float) -> bool:
        """A message of a peer that is up. Returns whether other groups may be affected."""
        match message:
            case TokensDecoded():
                self._tokens_decoded(peer, incarnation, message, now_s)
                return False  # tokens alone open and close nothing
            case SampleFinished() | SampleCancelled() | SampleRejected():
                self._ended(peer, message)
            case SampleScored():
                return self._scored(peer, message)
            case ScoreFailed():
                self._score_failed(peer, message)
        return True

    def lose(self, peer: str, *, is_gone: bool) -> None:
        """A process is gone or silent: its samples continue elsewhere. Those of which nothing is left to decode have
        finished, which their generator could not report."""
        for sample, reason in self._work.lose(peer, is_gone=is_gone):
            if sample.stage is Stage.WAITING:  # the end of one may have cancelled the next
                self._finish(sample, reason)

    def _tokens_decoded(self, peer: str, incarnation: int, message: TokensDecoded, now_s: float) -> None:
        totals = self._work.totals
        totals.received(peer, incarnation, len(message.token_ids))
        version, token_ids, logprobs = message.policy_version, message.token_ids, message.logprobs
        sample_ids, counts, begin = message.sample_ids.tolist(), message.num_tokens.tolist(), 0
        for sample_id, sample, count in zip(sample_ids, self._work.all_owned(peer, sample_ids), counts, strict=True):
            end = begin + count
            if sample is not None:
                sample.append(version, token_ids[begin:end], logprobs[begin:end])
            else:  # it was given to another generator while this one was silent
                totals.tokens_by_outcome["abandoned"] += count
                self._outbox.send(peer, Cancel(sample_id))
            begin = end
        seat, pace = self._work.generators.seats.get(peer), self._planner.pace
        if pace is not None and seat is not None:
            pace.reported(peer, sample_ids, counts, held=seat.sample_ids, num_slots=seat.num_slots, now_s=now_s)

    def _ended(self, peer: str, message: SampleFinished | SampleCancelled | SampleRejected) -> None:
        """A generator no longer has a sample. A cancel may come too late: then the decision holds all the same."""
        sample = self._work.owned(peer, message.sample_id)
        if sample is None:
            return
        assert isinstance(message, SampleRejected) or message.num_tokens == sample.num_tokens, (message, sample)
        if sample.stage is Stage.CANCELLING:
            self._work.end(sample, sample.end_outcome, sample.end_reason)
            return
        self._work.release(sample)
        match message:
            case SampleFinished(finish_reason=reason):
                self._finish(sample, reason)
            case SampleRejected():
                self._training.rejected(self._work.group_of(sample))
                self._fail(sample, "rejected_by_engine")

    def _finish(self, sample: Sample, reason: FinishReason) -> None:
        """A sample has come to the end of its response, and is to be scored."""
        group = self._work.group_of(sample)
        group.finish(sample, reason)
        self._work.score(sample)
        self._decide(group)

    def _scored(self, peer: str, message: SampleScored) -> bool:
        """Returns False if the group waits for others."""
        sample = self._awaited(peer, message.sample_id)
        if sample is None:
            return False
        self._work.totals.rewards.num_scored += 1
        sample.reward, sample.reward_parts = message.reward, message.parts
        sample.to(Stage.SCORED)
        group = self._work.group_of(sample)
        self._decide(group)
        return not self._outbox.is_empty or not group.undecided

    def _score_failed(self, peer: str, message: ScoreFailed) -> None:
        sample = self._awaited(peer, message.sample_id)
        if sample is not None:
            if self._work.totals.rewards.failed(message.kind, message.error):
                self._outbox.to_launcher(message)
            self._fail(sample, f"reward_{message.kind}")

    def _awaited(self, peer: str, sample_id: int) -> Sample | None:
        """The sample of a reward process's answer, if the answer still matters."""
        known = self._work.rewards.done(peer, sample_id)
        sample = self._work.sample(sample_id)
        return sample if known and sample is not None and sample.stage is Stage.FINISHED else None

    def _fail(self, sample: Sample, reason: str) -> None:
        """The sample has no reward, which is not a reward of zero."""
        sample.end_reason = reason
        sample.to(Stage.UNSCORABLE)
        self._decide(self._work.group_of(sample))

    def _decide(self, group: Group) -> None:
        """A sample of the group has finished, failed or got its reward."""
        if group.purpose == "train":
            self._training.decide(group)
        else:
            self._evaluation.decide(group)
