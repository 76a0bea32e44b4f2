"""Stories: what the ledger and the journal have of one sample or group."""

import doctest
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from darts_async.errors import ConfigError
from darts_async.protocol import SampleFinished, SampleScored, TokensDecoded, sample_id_of
from darts_async.shaper.durable.journal import FoundJournal
from darts_async.shaper.durable.replayable_state import Heard
from darts_async.shaper.ledger import (
    AnyRecord,
    GroupDropped,
    GroupOpened,
    GroupShipped,
    LedgerWriter,
    SampleEnded,
    SamplePlaced,
    StepCommitted,
    TakenBack,
)
from darts_async.topology.run_files import LEDGER_FILE
from launcher.analysis import story
from launcher.analysis.story import Subject, of_journal, parse_subject, read_story
from launcher.commands.cli import app


def run_with(run_dir: Path, records: list[AnyRecord]) -> Path:
    (run_dir / "config.yaml").write_text("{}")
    writer = LedgerWriter(run_dir / LEDGER_FILE)
    writer.append(records)
    writer.close()
    return run_dir


RECORDS: list[AnyRecord] = [
    GroupOpened(3, 17, "train", 2, 1, 4),
    SamplePlaced(sample_id_of(3, 0), "generator/0", 1),
    SamplePlaced(sample_id_of(3, 1), "generator/1", 2),
    GroupOpened(4, 18, "train", 1, 1, 5),
    SampleEnded(sample_id_of(3, 1), "cancelled", "pruned", 5, 1, 2, None, None),
    GroupShipped(3, 2),
    SampleEnded(sample_id_of(3, 0), "trained", "", 31, 1, 2, 2, 0.5),
    StepCommitted(2, (3, 4)),
]


def test_the_story_of_a_sample_has_its_group_and_nothing_of_others(tmp_path: Path) -> None:
    lines = read_story(run_with(tmp_path, RECORDS), parse_subject("3/0"))
    assert [line.text for line in lines] == [
        "opened for prompt 17 with 2 samples to train; no token is older than version 1",
        "3/0 was given to generator/0 (incarnation 1)",
        "its group was shipped to the learner for step 2",
        "3/0 ended trained in step 2 (no reason): 31 tokens of versions 1 to 2, reward 0.5",
        "step 2 was completed with its group in the gradient",
    ]


def test_the_story_of_a_group_has_all_its_samples(tmp_path: Path) -> None:
    lines = read_story(run_with(tmp_path, RECORDS), parse_subject("3"))
    assert "3/1 ended cancelled (pruned): 5 tokens of versions 1 to 2, no reward" in [line.text for line in lines]
    assert len(lines) == 7


def test_what_was_taken_back_is_told_as_void(tmp_path: Path) -> None:
    records = [*RECORDS[:2], GroupDropped(3, "few"), TakenBack(2), GroupShipped(3, 0)]
    lines = read_story(run_with(tmp_path, records), parse_subject("3"))
    assert [line.is_void for line in lines] == [False, False, True, False]


def test_the_journal_has_what_the_shaper_has_heard_of_a_sample() -> None:
    ids, counts = np.array([sample_id_of(3, 0), sample_id_of(3, 1)]), np.array([2, 1], np.int32)
    tokens = TokensDecoded(4, ids, counts, np.array([5, 6, 7], np.int32), np.zeros(3, np.float32))
    heard = [
        Heard(1.5, "generator/0", 1, 1, tokens),
        Heard(2.0, "generator/0", 1, 2, SampleFinished(sample_id_of(3, 0), "stop", 2)),
        Heard(2.5, "reward/0", 1, 1, SampleScored(sample_id_of(3, 0), 1.0)),
    ]
    lines = of_journal(FoundJournal(None, list(heard), 0, ""), parse_subject("3/0"))
    assert [line.text for line in lines] == [
        "1.500 s: generator/0 says: 3/0 has 2 more tokens of version 4",
        "2.000 s: generator/0 says: 3/0 is complete (stop) with 2 tokens",
        "2.500 s: reward/0 says: 3/0 has the reward 1",
    ]


def test_a_subject_that_the_run_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing about sample 9/0: its ledger has groups up to 4"):
        read_story(run_with(tmp_path, RECORDS), Subject(9, sample_id_of(9, 0)))


@pytest.mark.parametrize("text", ["", "x", "3/x", "sample/", "-1", "3/4096", "sample/3/1"])
def test_what_names_no_subject_is_refused_with_the_forms_that_do(text: str) -> None:
    with pytest.raises(ConfigError, match="give GROUP, GROUP/INDEX or sample/ID"):
        parse_subject(text)


def test_a_sample_can_be_named_as_the_audit_names_it() -> None:
    assert parse_subject(f"sample/{sample_id_of(7, 3)}") == parse_subject("7/3") == Subject(7, sample_id_of(7, 3))


def test_the_verb_tells_a_story(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["story", str(run_with(tmp_path, RECORDS)), "3/1"])
    assert done.exit_code == 0
    assert "ledger  3/1 was given to generator/1 (incarnation 2)" in done.stdout
    done = CliRunner().invoke(app, ["story", str(tmp_path), "12"])
    assert done.exit_code == 2


def test_the_examples_are_right() -> None:
    assert doctest.testmod(story).failed == 0
