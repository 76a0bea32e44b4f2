"""The audit: books that are in order pass, and each way of cooking them is found, with the ids."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from darts_async.config import RunConfig
from darts_async.prompts.source import ShuffledPrompts
from darts_async.protocol import sample_id_of
from darts_async.shaper.durable.replayable_state import JournalHead, ReplayableState
from darts_async.shaper.ledger import (
    AnyRecord,
    BroughtForward,
    GroupDropped,
    GroupOpened,
    GroupShipped,
    LearnerRewound,
    LedgerWriter,
    RunReopened,
    SampleEnded,
    SamplePlaced,
    StepCommitted,
    TakenBack,
    VersionSeen,
    WeightsAcknowledged,
    scan_ledger,
)
from darts_async.shaper.state import ShaperState
from darts_async.topology.run_files import LEDGER_FILE
from darts_async.wire.encoding import encode
from darts_async.wire.framing import frame
from launcher.analysis.audit_books import Books, audit
from launcher.commands.cli import app
from launcher.run_dir.run_dir import RunRecord, write_record
from tests.shaper.world import prompts

CONFIG = RunConfig.model_validate(
    {
        "learner": {"steps": 2, "groups_per_step": 2},
        "shaping": {"rule": "none", "launch": 3, "keep": 3},
        "staleness": {"max_staleness": 1},
    }
)


def ending(group_id: int, index: int, step: int | None, oldest: int = 0, newest: int | None = None) -> SampleEnded:
    outcome = "filtered" if step is None else "trained"
    newest = oldest if newest is None else newest
    return SampleEnded(sample_id_of(group_id, index), outcome, "why", 10, oldest, newest, step, 1.0)


def placed(group_id: int) -> list[AnyRecord]:
    return [SamplePlaced(sample_id_of(group_id, index), "generator/0", 1) for index in range(3)]


def good_records() -> list[AnyRecord]:
    """Two steps of two groups of three samples, and one group that was dropped."""
    records: list[AnyRecord] = []
    for group_id in range(4):
        step = group_id // 2
        if not group_id % 2:
            records += [WeightsAcknowledged("generator/0", 1, step), VersionSeen(step)]
        records += [GroupOpened(group_id, group_id + 50, "train", 3, step, group_id), *placed(group_id)]
        records.append(GroupShipped(group_id, step))
        if group_id % 2:
            records.append(StepCommitted(step, (group_id - 1, group_id)))
        records += [ending(group_id, index, step, oldest=step) for index in range(3)]
    records += [GroupOpened(4, 60, "train", 3, 1, 4), *placed(4), GroupDropped(4, "few")]
    return records + [ending(4, index, None) for index in range(3)]


def findings(
    records: list[AnyRecord], *, is_over: bool = True, num_steps: int | None = 2
) -> dict[str, tuple[int, ...]]:
    found = audit(Books.of(records), CONFIG, is_over=is_over, num_steps=num_steps)
    return {finding.rule: finding.ids for finding in found}


def test_books_in_order_pass() -> None:
    assert findings(good_records()) == {}


def test_a_group_may_be_short_of_samples_without_a_reward_down_to_the_minimum() -> None:
    missing = {"outcome": "filtered", "reason": "reward_raised", "step": None, "reward": None}
    short = changed(good_records(), SAMPLE, **missing)
    assert findings(short) == {}
    uneven = {"steps that did not use 6 samples": (1,)}
    assert findings(changed(good_records(), SAMPLE, **missing | {"reason": "not_selected"})) == uneven
    assert findings(changed(short, SAMPLE + 1, **missing)) == uneven


def first(records: list[AnyRecord], kind: type, **values: int) -> int:
    """The place of the first record of a kind with these values."""
    return next(
        place
        for place, record in enumerate(records)
        if isinstance(record, kind) and all(getattr(record, name) == value for name, value in values.items())
    )


def changed(records: list[AnyRecord], sample_id: int, **values: object) -> list[AnyRecord]:
    place = first(records, SampleEnded, sample_id=sample_id)
    return [*records[:place], msgspec.structs.replace(records[place], **values), *records[place + 1 :]]


SAMPLE = sample_id_of(2, 1)  # trained at step 1, of version 1

CRIMES: dict[str, tuple[Callable[[list[AnyRecord]], list[AnyRecord]], dict[str, tuple[int, ...]]]] = {
    "a sample is lost": (
        lambda records: [r for r in records if not (isinstance(r, SampleEnded) and r.sample_id == sample_id_of(4, 0))],
        {"samples that never ended": (sample_id_of(4, 0),)},
    ),
    "a sample ends twice": (
        lambda records: [*records, ending(4, 2, None)],
        {"samples that ended more than once": (sample_id_of(4, 2),)},
    ),
    "a sample is trained twice": (
        lambda records: [*records, ending(2, 1, 1, oldest=1)],
        {"samples that ended more than once": (SAMPLE,), "steps that did not use 6 samples": (1,)},
    ),
    "a group is trained twice": (
        lambda records: [
            *(r for r in records if not (isinstance(r, StepCommitted) and r.step == 1)),
            StepCommitted(1, (2, 3, 0)),
        ],
        {
            "groups trained on twice in the surviving history": (0,),
            "groups in the gradient of a step that they were not shipped for": (0,),
            "groups trained on according to their samples or to the steps, but not both": (0,),
        },
    ),
    "a step is taken twice": (
        lambda records: [*records, StepCommitted(1, (2, 3))],
        {"steps out of order": (1,)},
    ),
    "a step is undone and not taken again": (
        lambda records: [*records, LearnerRewound(1)],
        {"groups trained on according to their samples or to the steps, but not both": (2, 3)},
    ),
    "a step is taken again with another group": (
        lambda records: [*records, LearnerRewound(1), StepCommitted(1, (2,))],
        {"groups trained on according to their samples or to the steps, but not both": (3,)},
    ),
    "a learner comes back from a step that nobody saw it take": (
        lambda records: [*records, LearnerRewound(5)],
        {"steps out of order": (5,)},
    ),
    "a sample comes from nowhere": (
        lambda records: [*records, ending(9, 0, None)],
        {"samples that ended and were never started": (sample_id_of(9, 0),)},
    ),
    "a token is too old": (
        lambda records: changed(records, SAMPLE, oldest_version=-1),
        {
            "samples trained on with a token more than 1 versions old": (SAMPLE,),
            "samples decoded under a version older than their generator had acknowledged": (SAMPLE,),
            "samples decoded under a version older than the floor of their group": (SAMPLE,),
        },
    ),
    "a generator had not the version it was said to have": (
        lambda records: changed(records, SAMPLE, oldest_version=0),
        {
            "samples decoded under a version older than their generator had acknowledged": (SAMPLE,),
            "samples decoded under a version older than the floor of their group": (SAMPLE,),
        },
    ),
    "a generator is given work before it has the newest version": (
        lambda records: [*records, VersionSeen(2), SamplePlaced(sample_id_of(4, 2), "generator/0", 1)],
        {"samples given to a generator without the newest published version": (sample_id_of(4, 2),)},
    ),
    "a generator comes back and is taken for the one before": (
        lambda records: [*records, SamplePlaced(sample_id_of(4, 2), "generator/0", 2)],
        {"samples given to a generator without the newest published version": (sample_id_of(4, 2),)},
    ),
    "a trained sample was nowhere": (
        lambda records: [r for r in records if not (isinstance(r, SamplePlaced) and r.sample_id == SAMPLE)],
        {"samples decoded under a version older than their generator had acknowledged": (SAMPLE,)},
    ),
    "a held-out prompt is trained": (
        lambda records: [
            msgspec.structs.replace(r, purpose="evaluate") if isinstance(r, GroupOpened) and r.group_id == 2 else r
            for r in records
        ],
        {"samples trained on although their prompts are held out": tuple(sample_id_of(2, index) for index in range(3))},
    ),
    "a token comes from the future": (
        lambda records: changed(records, SAMPLE, newest_version=2),
        {"samples trained on before their tokens can have been decoded": (SAMPLE,)},
    ),
    "a sample is trained at another step": (
        lambda records: changed(records, SAMPLE, step=0, oldest_version=1),
        {
            "samples trained on at another step than their group was shipped for": (SAMPLE,),
            "samples trained on before their tokens can have been decoded": (SAMPLE,),
            "steps that did not use 6 samples": (0, 1),
            "groups trained on according to their samples or to the steps, but not both": (2,),
        },
    ),
    "a sample is trained without tokens": (
        lambda records: changed(records, SAMPLE, oldest_version=None, newest_version=None),
        {"samples trained on without a step or without tokens": (SAMPLE,)},
    ),
    "a group is shipped twice": (
        lambda records: [*records, GroupShipped(3, 1)],
        {
            "groups shipped more than once": (3,),
            "samples trained on at another step than their group was shipped for": tuple(
                sample_id_of(3, index) for index in range(3)
            ),
        },
    ),
    "a group is shipped and dropped": (
        lambda records: [*records, GroupDropped(0, "why")],
        {"groups shipped and dropped": (0,)},
    ),
    "a group is opened twice": (
        lambda records: [*records, GroupOpened(4, 61, "train", 3, 1, 4)],
        {"groups opened twice": (4,)},
    ),
}


@pytest.mark.parametrize("crime", CRIMES)
def test_each_crime_is_found_with_the_ids(crime: str) -> None:
    commit, expected = CRIMES[crime]
    assert findings(commit(good_records())) == expected


def test_steps_that_a_restarted_learner_has_taken_again_are_no_crime() -> None:
    assert findings([*good_records(), LearnerRewound(0), StepCommitted(0, (1, 0)), StepCommitted(1, (2, 3))]) == {}
    assert findings([*good_records(), LearnerRewound(0)], num_steps=None) == {}, "a run that ended before it could"


def test_a_run_that_goes_on_may_publish_a_version_anew() -> None:
    again = WeightsAcknowledged("generator/0", 2, 2), SamplePlaced(sample_id_of(4, 2), "generator/0", 2)
    assert findings([*good_records(), VersionSeen(3), RunReopened(2), *again]) == {}
    assert findings([*good_records(), VersionSeen(3), *again]) != {}


def test_a_live_run_may_have_samples_that_go_on_and_steps_that_are_not_full() -> None:
    records = good_records()[: first(good_records(), StepCommitted)]
    assert findings(records, is_over=False, num_steps=None) == {}
    assert list(findings(records, is_over=True, num_steps=None)) == ["samples that never ended"]


@given(st.data())
def test_a_ledger_that_lacks_any_ending_is_never_clean(data: st.DataObject) -> None:
    records = good_records()
    endings = [place for place, record in enumerate(records) if isinstance(record, SampleEnded)]
    gone = set(data.draw(st.lists(st.sampled_from(endings), min_size=1, max_size=8)))
    missing = tuple(sorted(records[place].sample_id for place in gone))  # type: ignore[union-attr]
    left = [record for place, record in enumerate(records) if place not in gone]
    assert findings(left)["samples that never ended"] == missing


# --- a run directory -------------------------------------------------------------------------------------------


def run_dir_of(tmp_path: Path, records: list[AnyRecord], status: str = "finished") -> Path:
    (tmp_path / "config.yaml").write_text(
        "learner: {steps: 2, groups_per_step: 2}\nshaping: {rule: none, launch: 3, keep: 3}\n"
        "staleness: {max_staleness: 1}\n"
    )
    write_record(tmp_path, RunRecord(status, "why", 0.0, 1.0, 1))  # type: ignore[arg-type]
    ledger = LedgerWriter(tmp_path / "ledger.msgpack")
    ledger.append(records)
    ledger.close()
    return tmp_path


def test_the_verb_says_so_and_ends_with_0_where_nothing_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["audit", str(run_dir_of(tmp_path, good_records()))])
    assert result.exit_code == 0, result.output
    assert "15 samples were started in 5 groups, 15 have ended, 12 were trained on" in " ".join(result.output.split())
    assert "no sample was lost" in result.output


def test_the_verb_ends_with_1_and_the_ids_where_something_is(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["audit", str(run_dir_of(tmp_path, good_records()[:-1]))])
    assert result.exit_code == 1
    assert f"1 samples that never ended: {sample_id_of(4, 2)}" in result.output
    result = CliRunner().invoke(app, ["audit", "--json", str(tmp_path)])
    assert result.exit_code == 1
    assert msgspec.json.decode(result.output)["findings"] == [
        {"rule": "samples that never ended", "ids": [sample_id_of(4, 2)]}
    ]


def test_a_torn_tail_is_no_record(tmp_path: Path) -> None:
    run_dir = run_dir_of(tmp_path, good_records())
    with (run_dir / "ledger.msgpack").open("ab") as file:
        file.write(frame(msgspec.msgpack.encode(ending(4, 2, None)))[:-3])
    assert CliRunner().invoke(app, ["audit", str(run_dir)]).exit_code == 0


def test_what_is_no_run_directory_is_bad_input(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["audit", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert str(tmp_path / "nowhere") in result.output.replace("\n", "")


def step_line(step: int) -> dict[str, object]:
    return {"type": "step", "step": step, "reward/pool_mean": 0.5, "elapsed_s": 1.0}


def write_lines(run_dir: Path, lines: list[dict[str, object]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def rules_of(run_dir: Path) -> dict[str, tuple[int, ...]]:
    result = CliRunner().invoke(app, ["audit", "--json", str(run_dir)])
    found = msgspec.json.decode(result.output)["findings"]
    assert result.exit_code == (1 if found else 0), result.output
    return {finding["rule"]: tuple(finding["ids"]) for finding in found}


def begins_of(run_dir: Path, kind: type[AnyRecord]) -> list[int]:
    """The first byte of each such record of the ledger."""
    written = scan_ledger(run_dir / LEDGER_FILE).written
    return [written.begin(number) for number, record in enumerate(written) if isinstance(record, kind)]


STEPS = "steps in metrics.jsonl that the ledger does not know"
VERSIONS = "versions in checkpoints/ that the ledger does not explain"


@pytest.mark.parametrize("status", ["running", "failed"])
@pytest.mark.parametrize("loss", ["gone", "empty", "damaged", "zeros", "cut"])
def test_a_ledger_that_lost_what_other_files_tell_is_never_clean(tmp_path: Path, loss: str, status: str) -> None:
    run_dir = run_dir_of(tmp_path, good_records(), status)
    for version in (1, 2):
        (run_dir / "checkpoints" / f"step-{version:06d}").mkdir(parents=True)
    write_lines(run_dir, [step_line(0), step_line(1)])
    (run_dir / "shaper.journal").write_bytes(frame(encode(head_after(run_dir))))
    assert rules_of(run_dir) == {}
    path, data = run_dir / "ledger.msgpack", (run_dir / "ledger.msgpack").read_bytes()
    match loss:
        case "gone":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "damaged":
            path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
        case "zeros":
            path.write_bytes(bytes(len(data)))
        case "cut":
            path.write_bytes(data[: begins_of(run_dir, StepCommitted)[0]])
    found = rules_of(run_dir)
    assert "records, by their number, that the journal has seen written and the ledger lacks" in found
    assert ("byte of the ledger from which on it cannot be read" in found) == (loss in ("damaged", "zeros"))
    if loss == "cut":
        assert (found[STEPS], found[VERSIONS]) == ((1,), (2,)), "the first step was shipped, and may have been taken"
    else:
        assert (found[STEPS], found[VERSIONS]) == ((0, 1), (1, 2))


def test_what_is_of_an_earlier_life_is_not_held_against_a_run_that_was_taken_up(tmp_path: Path) -> None:
    first = first_step_of(good_records())
    run_dir = run_dir_of(tmp_path, [*first, TakenBack(len(first) - 3), *first[-3:], RunReopened(1, 2)], "running")
    write_record(run_dir, RunRecord("running", "", 1e12, None, 1, life=2))
    (run_dir / "checkpoints" / "step-000002").mkdir(parents=True)
    lines = [step_line(0), step_line(1), {"type": "resumed", "life": 2, "elapsed_s": 2.0}]
    write_lines(run_dir, lines)
    assert rules_of(run_dir).keys() == {
        "byte from which on the journal cannot be read: " + f"{run_dir}/shaper.journal is not there"
    }
    write_lines(run_dir, [*lines, step_line(1)])
    assert rules_of(run_dir)[STEPS] == (1,)


def test_a_ledger_that_goes_on_with_sums_is_held_to_what_is_known(tmp_path: Path) -> None:
    records = good_records()
    left, after = records[:5], first_step_of(records, step=1)
    sums = BroughtForward(100, 1, 2, {"trained": 6}, {"trained": 60})
    assert findings([*left, sums, *after]) == {}
    assert findings([*left, sums, *after, StepCommitted(1, (2, 3))]) == {"steps out of order": (1,)}
    found = findings([*left, records[2], sums, *after])
    assert found == {"groups opened twice": (0,)}, "what is left is held to what must hold of it"


def first_step_of(records: list[AnyRecord], step: int = 0) -> list[AnyRecord]:
    """Those about the first step alone, or about what begins with a later one."""
    commits = [place for place, record in enumerate(records) if isinstance(record, StepCommitted)]
    end = commits[0] + 4
    return records[:end] if step == 0 else records[end:]


def head_after(run_dir: Path) -> JournalHead:
    """As of a shaper that has written the ledger of a run."""
    source = ShuffledPrompts(prompts(3), seed=1)
    replayable = ReplayableState(lambda snapshot: ShaperState(CONFIG, source, (), snapshot=snapshot))
    ledger = scan_ledger(run_dir / LEDGER_FILE)
    replayable.lineage.num_records = ledger.counted.lineage.num_records
    return replayable.to_head(ledger.num_bytes)
