"""What the thread writes: records as the reward and the gradient had them, within the limit, never worth a run."""

import json
import threading
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import msgspec
import numpy as np
import pytest
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from darts_async.config import RunConfig
from darts_async.errors import NoSpaceError
from darts_async.models.location import load_tokenizer, resolve_model_path
from darts_async.prompts.source import Prompt
from darts_async.protocol import sample_id_of
from darts_async.rollouts import FileName, Rollout, read_rollouts
from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.rollout_writer import MAX_WAITING, RolloutWriter, rollouts_of, token_texts
from darts_async.shaper.rollouts import RolloutFile
from tests.support.byte_tokenizer import make_byte_tokenizer

TOKENIZER = load_tokenizer(resolve_model_path("darts_async.quickstart:model", with_weights=False))
QUESTION, ANSWER = "7 +5 =", "+5 2 ans 2"


def ids_of(text: str) -> np.ndarray:
    return np.array(TOKENIZER.encode(text, add_special_tokens=False).ids, np.int32)


def sample(index: int, reward: float | None, text: str = ANSWER, versions: tuple[int, ...] = (4, 5)) -> Sample:
    """One that was decoded under these versions, a part each."""
    tokens = ids_of(text)
    parts = np.array_split(tokens, len(versions))
    chunks = [(v, part, np.full(len(part), -0.25, np.float32)) for v, part in zip(versions, parts, strict=True)]
    outcome = "cancelled" if reward is None else "trained"
    return Sample(
        sample_id_of(9, index),
        Stage.ENDED,
        num_tokens=len(tokens),
        oldest_version=versions[0],
        newest_version=versions[-1],
        finish_reason=None if reward is None else "stop",
        reward=reward,
        end_outcome=outcome,  # type: ignore[arg-type]
        end_reason="survivor" if reward is None else "committed",
        chunks=chunks,
        decoded_by=["generator/1", "generator/0"],
    )


def group(*samples: Sample, step: int = 5) -> Group:
    prompt = Prompt(3, QUESTION, ids_of(QUESTION), "2", '{"k": 1}')
    weights = {each.sample_id: 1.0 for each in samples if each.reward is not None}
    return Group(9, prompt, "train", list(samples), weights=weights, step=step, is_shown=True)


def file(number: int = 5, serial: int = 0, kind: str = "train") -> RolloutFile:
    name = FileName(kind, number)  # type: ignore[arg-type]
    return RolloutFile(serial, name, [group(sample(0, 1.0), sample(1, None), sample(2, 0.0, ANSWER * 3))])


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Callable[..., RolloutWriter]]:
    """Makes writers of `tmp_path / "samples"`; their threads end with the test."""
    made: list[RolloutWriter] = []

    def make(max_mb: float = 10.0, load: Callable[[], Tokenizer] = lambda: TOKENIZER) -> RolloutWriter:
        config = RunConfig.model_validate({"telemetry": {"samples_max_mb": max_mb}})
        made.append(RolloutWriter(tmp_path / "samples", config, load))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in (tmp_path / "samples").iterdir())


def settled(writer: RolloutWriter, unwritten: list[RolloutFile]) -> dict[int, bool]:
    """Turn after turn until every file is done with: what was given up."""
    done: dict[int, bool] = {}
    waits = threading.Event()
    for _ in range(3000):
        done |= dict(writer.turn([each for each in unwritten if each.serial not in done]))
        if len(done) == len(unwritten):
            return done
        waits.wait(0.01)
    raise AssertionError(f"{done} of {len(unwritten)}")


def test_a_record_says_what_the_reward_and_the_gradient_had() -> None:
    first, cancelled, third = rollouts_of(file(), RunConfig(), TOKENIZER)
    assert (first.prompt, first.model_input, first.answer, first.metadata) == (QUESTION, QUESTION, "2", {"k": 1})
    assert (first.text, "".join(first.tokens), first.length) == (ANSWER, ANSWER, 4)
    assert (first.sample, first.kind, first.step, first.prompt_id) == ("9/0", "train", 5, 3)
    assert (first.versions, first.logprobs) == ([4, 4, 5, 5], [-0.25] * 4)
    assert (first.reward, first.advantage, third.advantage) == (1.0, 1.0, -1.0), "mean 1/2, deviation 1/2"
    assert (first.selected, first.weight, first.outcome, first.why) == (True, 1.0, "trained", "committed")
    assert first.generators == ["generator/1", "generator/0"]
    assert (cancelled.outcome, cancelled.why, cancelled.reward) == ("cancelled", "survivor", None)
    assert (cancelled.selected, cancelled.advantage, cancelled.finish_reason) == (False, None, None)
    assert cancelled.text == ANSWER, "its text is kept too"


def test_a_group_that_came_to_nothing_has_no_advantages_and_one_without_a_token_has_no_text() -> None:
    state = group(sample(0, 1.0))
    given_up = Group(9, state.prompt, "train", [Sample(sample_id_of(9, 0), Stage.ENDED)], step=None)
    [shown] = rollouts_of(RolloutFile(0, FileName("train", 2), [given_up]), RunConfig(), TOKENIZER)
    assert (shown.text, shown.tokens, shown.token_ids, shown.oldest_version) == ("", [], [], None)
    assert (shown.selected, shown.advantage) == (False, None)


def test_the_texts_of_tokens_are_the_whole_text_with_special_tokens() -> None:
    ids = [*ids_of("7 +5 ans 2").tolist(), 1]
    texts = token_texts(ids, TOKENIZER)
    assert len(texts) == len(ids)
    assert "".join(texts) == TOKENIZER.decode(ids, skip_special_tokens=False)
    assert token_texts([0, 10**6, 2], TOKENIZER)[1] == "", "a token that the vocabulary lacks has no text"


def test_a_long_run_of_tokens_that_are_no_text_does_not_wait_for_its_end() -> None:
    """A stream would decode all of them again with each: the texts come in pieces of bounded length."""
    tokenizer = make_byte_tokenizer()
    half = tokenizer.encode("é", add_special_tokens=False).ids[0]
    texts = token_texts([half] * 100, tokenizer)
    assert len(texts) == 100
    longest = max(len(list(group)) for text, group in groupby(texts) if not text)
    assert longest < 16
    assert token_texts(tokenizer.encode("né").ids, tokenizer)[-1] == "é"


def test_a_file_is_written_once_and_again_under_its_name(tmp_path: Path, writers: Callable[..., RolloutWriter]) -> None:
    writer = writers()
    assert settled(writer, [file(5, 0), file(6, 1)]) == {0: False, 1: False}
    before = (tmp_path / "samples" / "train-000005.jsonl.gz").read_bytes()
    assert settled(writer, [file(5, 2)]) == {2: False}
    assert (tmp_path / "samples" / "train-000005.jsonl.gz").read_bytes() == before
    assert names(tmp_path) == ["train-000005", "train-000006"]
    assert [each.sample for each in read_rollouts(tmp_path / "samples" / "train-000006.jsonl.gz")] == [
        "9/0",
        "9/1",
        "9/2",
    ]


def test_the_folder_keeps_to_its_limit_training_steps_go_first(
    tmp_path: Path, writers: Callable[..., RolloutWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darts_async.shaper.rollout_writer.encode_rollouts", lambda _: bytes(300_000))
    some = [file(0, 0, "held-out"), file(0, 1), file(1, 2), file(2, 3), file(3, 4), file(4, 5, "held-out")]
    assert not any(settled(writers(1.0), some).values())
    assert names(tmp_path) == ["held-out-000000", "held-out-000004", "train-000003"]
    writers(1.0).close([file(9, 0, "held-out"), file(12, 1, "held-out")])
    assert names(tmp_path) == ["held-out-000004", "held-out-000009", "held-out-000012"], "a later process knows them"


def test_a_file_beyond_the_limit_alone_is_given_up(
    tmp_path: Path, writers: Callable[..., RolloutWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writers(1.0)
    assert settled(writer, [file(0, 0)]) == {0: False}
    monkeypatch.setattr("darts_async.shaper.rollout_writer.encode_rollouts", lambda _: bytes(1_000_001))
    with capture_logs() as logs:
        assert settled(writer, [file(1, 1)]) == {1: True}
    assert "train-000001.jsonl.gz has 1,000,001 bytes: telemetry.samples_max_mb allows 1,000,000" in logs[0]["error"]
    assert names(tmp_path) == ["train-000000"], "no other file makes room for it"


def test_a_full_disk_costs_rollouts_and_is_said_once(
    tmp_path: Path, writers: Callable[..., RolloutWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_full = True

    def full(path: Path, data: bytes) -> None:
        if is_full:
            raise NoSpaceError("no space left on /runs")
        path.write_bytes(data)

    monkeypatch.setattr("darts_async.shaper.rollout_writer.replace_file", full)
    writer = writers()
    with capture_logs() as logs:
        assert settled(writer, [file(0, 0), file(1, 1), file(2, 2)]) == {0: True, 1: True, 2: True}
        is_full = False
        assert settled(writer, [file(3, 3)]) == {3: False}
    assert [(each["event"], each["log_level"]) for each in logs] == [("rollouts_not_written", "warning")]
    assert "no space left on /runs" in logs[0]["error"]
    assert names(tmp_path) == ["train-000003"]


def test_a_tokenizer_that_cannot_be_loaded_is_no_end_of_a_run(writers: Callable[..., RolloutWriter]) -> None:
    def fails() -> Tokenizer:
        raise RuntimeError("no tokenizer")

    with capture_logs() as logs:
        assert settled(writers(load=fails), [file(0, 0)]) == {0: True}
    assert "RuntimeError: no tokenizer" in logs[0]["error"]


def test_where_the_thread_falls_back_the_oldest_files_are_given_up_and_nothing_waits(
    tmp_path: Path, writers: Callable[..., RolloutWriter]
) -> None:
    may_go_on = threading.Event()

    def waits() -> Tokenizer:
        assert may_go_on.wait(60)
        return TOKENIZER

    writer = writers(load=waits)
    some = [file(number, number) for number in range(40)]
    given_up: dict[int, bool] = {}
    for end in range(1, 41):  # one more with each turn, none of which waits
        given_up |= dict(writer.turn([each for each in some[:end] if each.serial not in given_up]))
    assert all(given_up.values())
    assert list(given_up) == sorted(given_up)
    may_go_on.set()
    rest = settled(writer, [each for each in some if each.serial not in given_up])
    assert not any(rest.values())
    assert MAX_WAITING <= len(rest) <= MAX_WAITING + 4, "those that it had, and the newest that waited"
    assert max(rest) == 39


def test_what_was_undone_is_removed_and_not_heard_of(tmp_path: Path, writers: Callable[..., RolloutWriter]) -> None:
    writer = writers()
    settled(writer, [file(number, number) for number in range(4)])
    settled(writer, [file(version, 10 + version, "held-out") for version in (0, 2, 3)])
    writer.void(2)
    assert settled(writer, [file(2, 0)]) == {0: False}, "serials begin again, too"
    assert names(tmp_path) == ["held-out-000000", "held-out-000002", "train-000000", "train-000001", "train-000002"]


def test_what_a_killed_process_has_begun_to_write_is_removed(
    tmp_path: Path, writers: Callable[..., RolloutWriter]
) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "train-000001.jsonl.gz.new").write_bytes(b"torn")
    (tmp_path / "samples" / "mine.txt").write_text("the user's")
    settled(writers(), [file(0, 0)])
    assert names(tmp_path) == ["mine", "train-000000"]


def test_the_end_of_the_process_writes_what_is_left(tmp_path: Path, writers: Callable[..., RolloutWriter]) -> None:
    writers().close([file(number, number) for number in range(6)])
    assert len(names(tmp_path)) == 6


def test_every_line_has_all_columns() -> None:
    bare = Rollout(
        kind="train", step=5, sample="9/0", group_id=9, sample_index=0, prompt_id=3, prompt="", outcome="abandoned"
    )
    for each in (bare, *rollouts_of(file(), RunConfig(), TOKENIZER)):
        assert list(json.loads(msgspec.json.encode(each))) == list(Rollout.__struct_fields__)
