"""The probe: what is asked, what is compared, and that samples of the shaper are not touched by it."""

import numpy as np
import pytest

from darts_async.config import WeightsConfig
from darts_async.generator.engine import Outbox, SampleEnd, StepEvents
from darts_async.generator.probe import Probing
from darts_async.learner.model import use_packed_attention
from darts_async.learner.publishing import packed_reference
from darts_async.protocol import LearnerToGenerator, ProbeMeasured, ProbeWeights, UpdateApplied, WeightsRefused
from darts_async.weights.probe import NUM_PROMPTS, Examiner, Reference, mismatch, reference_of, tolerance_of
from tests.fakes.weights_learner import last_logits
from tests.generator.world import VOCAB_SIZE, embedded, tiny_qwen3


def reference(version: int = 3) -> Reference:
    return reference_of(last_logits(tiny_qwen3(1)), version, vocab_size=VOCAB_SIZE)


def right_answer(asked: Reference, tokens: tuple[int, ...] = (4, 0, 47, 9)) -> ProbeMeasured:
    logprobs = asked.logprobs[np.arange(NUM_PROMPTS), list(tokens)]
    return ProbeMeasured(asked.policy_version, np.array(tokens, np.int32), logprobs.astype(np.float32))


def test_the_right_answer_is_accepted_and_one_off_by_more_than_the_tolerance_is_not() -> None:
    asked, answer = reference(), right_answer(reference())
    assert mismatch(asked, answer, 0.01) is None
    off = ProbeMeasured(3, answer.token_ids, answer.logprobs + np.array([0, 0, 0.04, 0], np.float32))
    assert mismatch(asked, off, 0.019) is not None, "the root mean square is .02"
    assert mismatch(asked, off, 0.021) is None
    broken = ProbeMeasured(3, answer.token_ids, answer.logprobs * np.float32(np.nan))
    assert mismatch(asked, broken, 0.01) is not None


def test_in_bfloat16_one_rounded_token_passes_and_a_difference_of_all_does_not() -> None:
    """One of a real model was off by .48 by rounding alone, and wrong weights move all tokens."""
    asked, answer = reference(), right_answer(reference())
    tolerance = tolerance_of(WeightsConfig(), "bfloat16")
    rounded = ProbeMeasured(3, answer.token_ids, answer.logprobs + np.array([0.1, -0.06, 0.55, 0.02], np.float32))
    assert mismatch(asked, rounded, tolerance) is None
    wrong = ProbeMeasured(3, answer.token_ids, answer.logprobs + np.array([0.4, -0.4, 0.4, -0.4], np.float32))
    assert mismatch(asked, wrong, tolerance) is not None


def test_an_answer_that_says_nothing_is_no_mismatch_and_one_of_the_wrong_shape_is() -> None:
    asked, nothing = reference(), np.empty(0, np.int32)
    assert mismatch(asked, ProbeMeasured(3, nothing, nothing.astype(np.float32)), 0.01) is None
    assert mismatch(asked, right_answer(reference(4)), 0.01) is None
    assert mismatch(asked, ProbeMeasured(3, np.array([1], np.int32), np.array([-1], np.float32)), 0.01) is not None
    assert (
        mismatch(asked, ProbeMeasured(3, np.full(4, VOCAB_SIZE, np.int32), np.zeros(4, np.float32)), 0.01) is not None
    )


def test_the_prompts_of_another_version_are_others() -> None:
    assert not np.array_equal(reference(3).prompts, reference(4).prompts)
    assert np.array_equal(reference(3).prompts, reference(3).prompts)


def test_the_examiner_asks_who_applied_the_version_and_refuses_a_wrong_answer_only() -> None:
    sent: list[tuple[str, LearnerToGenerator]] = []
    examiner = Examiner(lambda peer, message: sent.append((peer, message)), 0.01)
    asked = reference()
    examiner.handle("a", UpdateApplied(1, 3, 0.0))
    assert sent == [], "nothing is published yet"
    examiner.expect(asked)
    examiner.handle("a", UpdateApplied(1, 2, 0.0))
    examiner.handle("a", UpdateApplied(1, 3, 0.0))
    ((peer, question),) = sent
    assert peer == "a"
    assert isinstance(question, ProbeWeights)
    assert np.array_equal(question.prompt_tokens.reshape(-1, question.prompt_length), asked.prompts)
    examiner.handle("a", right_answer(asked))
    assert len(sent) == 1
    answer = right_answer(asked)
    examiner.handle("b", ProbeMeasured(3, answer.token_ids, answer.logprobs - 1))
    peer, refused = sent[-1]
    assert peer == "b"
    assert isinstance(refused, WeightsRefused)
    assert "1 nats" in refused.reason


async def test_a_generator_answers_with_the_logprobs_of_its_weights_between_its_samples() -> None:
    answers: Outbox = []
    probing = Probing()
    engine = embedded(tiny_qwen3(1))
    probing.ask(reference().question())
    for request in probing.begin(3, answers):
        engine.start(request)
    while engine.num_unfinished:
        events = probing.sift(await engine.step(), 3, answers)
        assert not len(events.sample_ids)
        assert not events.ended
    await engine.close()
    (answer,) = answers
    assert isinstance(answer, ProbeMeasured)
    assert mismatch(reference(), answer, 1e-4) is None
    assert mismatch(reference_of(last_logits(tiny_qwen3(2)), 3, vocab_size=VOCAB_SIZE), answer, 0.1) is not None
    assert probing.num_tokens == NUM_PROMPTS


def events(*sample_ids: int) -> StepEvents:
    count = len(sample_ids)
    ids = np.array(sample_ids, np.int64)
    ends = tuple(SampleEnd(sample_id, 1, "length") for sample_id in sample_ids if sample_id < 0)
    return StepEvents(ids, np.arange(count, dtype=np.int32), np.zeros(count, np.float32), ends)


def test_samples_of_the_shaper_pass_untouched() -> None:
    answers: Outbox = []
    probing = Probing()
    plain = events(5, 6)
    assert probing.sift(plain, 3, answers) is plain
    probing.ask(reference().question())
    ids = [request.sample_id for request in probing.begin(3, answers)]
    sifted = probing.sift(events(5, *ids, 6), 3, answers)
    assert sifted.sample_ids.tolist() == [5, 6]
    assert sifted.token_ids.tolist() == [0, 5]
    assert sifted.ended == ()
    (answer,) = answers
    assert isinstance(answer, ProbeMeasured)
    assert answer.token_ids.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("begun_under", [2, 3])
def test_a_probe_that_the_next_version_overtakes_answers_nothing(begun_under: int) -> None:
    answers: Outbox = []
    probing = Probing()
    probing.ask(reference(3).question())
    ids = [request.sample_id for request in probing.begin(begun_under, answers)]
    if ids:
        probing.sift(events(*ids), 4, answers)
    (answer,) = answers
    assert isinstance(answer, ProbeMeasured)
    assert answer.policy_version == 3
    assert not len(answer.token_ids)


def test_the_tolerance_is_as_set_or_by_the_dtype() -> None:
    assert tolerance_of(WeightsConfig(), "float32") < tolerance_of(WeightsConfig(), "bfloat16")
    assert tolerance_of(WeightsConfig(probe_tolerance_nats=0.3), "float32") == 0.3


def test_a_packed_reference_is_that_of_every_prompt_alone() -> None:
    model = tiny_qwen3(1)
    alone = reference()
    use_packed_attention(model)
    packed = packed_reference(model, 3)
    assert np.array_equal(packed.prompts, alone.prompts)
    assert np.abs(packed.logprobs - alone.logprobs).max() < 1e-4
    assert all(parameter.grad is None for parameter in model.parameters())
