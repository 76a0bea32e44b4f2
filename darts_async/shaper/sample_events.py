"""What generators and reward processes say of samples: tokens, ends and rewards.

Each report moves one sample on and lets its group decide: a training group by its rule, a held-out one when all of its
samples are scored. What a process says late, of a sample that it no longer has, changes nothing but the count of lost
tokens.
"""

from darts_async.protocol import (
    Cancel,
    FinishReason,
    RewardFailed,
    SampleCancelled,
    SampleFinished,
    SampleRejected,
    SampleScored,
    ScoreFailed,
    TokensDecoded,
)
from darts_async.shaper.estimates.decode_elasticity import DecodePace
from darts_async.shaper.evaluation import Evaluation
from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.open_work import OpenWork
from darts_async.shaper.outbox import Outbox
from darts_async.shaper.training import Training

OfSamples = TokensDecoded | SampleFinished | SampleCancelled | SampleRejected | SampleScored | ScoreFailed
"""The messages that `SampleEvents` handles."""


class SampleEvents:
    """Carries reports over to samples and their groups; it has no state of its own."""

    def __init__(
        self, work: OpenWork, pace: DecodePace | None, training: Training, evaluation: Evaluation, outbox: Outbox
    ) -> None:
        self._work = work
        self._pace = pace
        self._training = training
        self._evaluation = evaluation
        self._outbox = outbox

    def handle(self, peer: str, incarnation: int, message: OfSamples, now_s: float) -> bool:
        """A message of a peer that is up. Returns whether something may follow from it for other groups."""
        match message:
            case TokensDecoded():
                self._tokens_decoded(peer, incarnation, message, now_s)
                return False  # tokens alone open and close nothing
            case SampleFinished():
                self._finished(peer, message)
            case SampleCancelled():
                self._cancelled(peer, message)
            case SampleRejected():
                self._rejected(peer, message)
            case SampleScored():
                return self._scored(peer, message)
            case ScoreFailed():
                self._score_failed(peer, message)
        return True

    def lose(self, peer: str, *, is_gone: bool) -> None:
        """A process is gone or silent: what it had continues elsewhere. A sample of which nothing is left to decode is
        finished, which its generator could not say any more."""
        for sample, reason in self._work.lose(peer, is_gone=is_gone):
            if sample.stage is Stage.WAITING:  # what was decided about one may have cancelled the next
                self._finish(sample, reason)

    # --- from generators -------------------------------------------------------------------------------------

    def _tokens_decoded(self, peer: str, incarnation: int, message: TokensDecoded, now_s: float) -> None:
        totals = self._work.totals
        totals.num_tokens_received += len(message.token_ids)
        totals.tokens_by_generator[peer][incarnation] += len(message.token_ids)
        version, token_ids, logprobs = message.policy_version, message.token_ids, message.logprobs
        sample_ids, counts, begin = message.sample_ids.tolist(), message.num_tokens.tolist(), 0
        for sample_id, sample, count in zip(sample_ids, self._work.all_owned(peer, sample_ids), counts, strict=True):
            end = begin + count
            if sample is not None:
                sample.append(version, token_ids[begin:end], logprobs[begin:end])
            else:  # it was given to another generator while this one was silent
                totals.tokens_by_outcome["lost"] += count
                self._outbox.send(peer, Cancel(sample_id))
            begin = end
        seat = self._work.generators.seat(peer)
        if self._pace is not None and seat is not None:
            self._pace.reported(peer, sample_ids, counts, held=seat.sample_ids, num_slots=seat.num_slots, now_s=now_s)

    def _finished(self, peer: str, message: SampleFinished) -> None:
        sample = self._work.owned(peer, message.sample_id)
        if sample is None:
            return
        assert message.num_tokens == sample.num_tokens, (message, sample.num_tokens)
        self._work.release(sample)
        if sample.stage is Stage.CANCELLING:  # the cancel came too late, the decision stays
            self._end_as_decided(sample)
        else:
            self._finish(sample, message.finish_reason)

    def _cancelled(self, peer: str, message: SampleCancelled) -> None:
        sample = self._work.owned(peer, message.sample_id)
        if sample is not None and sample.stage is Stage.CANCELLING:
            assert message.num_tokens == sample.num_tokens, (message, sample.num_tokens)
            self._end_as_decided(sample)

    def _rejected(self, peer: str, message: SampleRejected) -> None:
        sample = self._work.owned(peer, message.sample_id)
        if sample is None:
            return
        self._work.release(sample)
        if sample.stage is Stage.CANCELLING:
            self._end_as_decided(sample)
        else:
            self._training.rejected(self._work.group_of(sample))
            self._fail(sample, "rejected_by_engine")

    def _end_as_decided(self, sample: Sample) -> None:
        self._work.end(sample, sample.end_outcome, sample.end_reason)

    def _finish(self, sample: Sample, reason: FinishReason) -> None:
        """A sample has come to the end of its response, and is to be scored."""
        group = self._work.group_of(sample)
        group.finish(sample, reason)
        self._work.score(sample)
        self._decide(group)

    # --- from reward processes -------------------------------------------------------------------------------

    def _scored(self, peer: str, message: SampleScored) -> bool:
        """False if nothing follows from it: the group waits for others."""
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
                self._outbox.to_launcher(RewardFailed(message.sample_id, message.kind, message.error))
            self._fail(sample, f"reward_{message.kind}")

    def _awaited(self, peer: str, sample_id: int) -> Sample | None:
        """The sample that this reward process has just answered for, if the answer still matters."""
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
