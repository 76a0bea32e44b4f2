"""Records: what can be used is read in full, what cannot is refused with its place and the fix."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.errors import DataError
from darts_async.prompts.records import Fields, Record, parse_record, read_records

FIELDS = Fields("prompt", "answer")
GSM8K = Fields("question", "answer", re.compile(r"####\s*(.+)"))
texts = st.text().filter(str.strip)


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parse(row: Any, fields: Fields = FIELDS) -> Record:
    return parse_record(row, "f.jsonl, line 7", fields)


def test_every_other_field_is_metadata_as_it_is(tmp_path: Path) -> None:
    others = {"level": 5, "hard": True, "rate": 0.5, "none": None, "tests": [{"in": "1", "out": [2]}], "big": 2**70}
    row = {"prompt": "1+1", "answer": 2, **others}
    (record,) = read_records([write_jsonl(tmp_path / "a.jsonl", row)], "jsonl", FIELDS)
    assert (record.prompt, record.answer) == ("1+1", "2")
    assert record.metadata == others
    assert record.place == f"{tmp_path / 'a.jsonl'}, line 1"


@given(texts, st.text(), st.dictionaries(st.text(), st.text() | st.integers() | st.booleans()))
def test_any_texts_pass_unchanged(prompt: str, answer: str, others: dict[str, Any]) -> None:
    record = parse({**others, "prompt": prompt, "answer": answer})
    assert (record.prompt, record.answer, record.question) == (prompt, answer, prompt)
    assert record.metadata == {name: value for name, value in others.items() if name not in ("prompt", "answer")}


def test_a_dotted_name_reaches_into_nested_objects() -> None:
    row = {"prompt": "p", "reward_model": {"ground_truth": "42", "style": "rule"}, "source": "s"}
    record = parse(row, Fields("prompt", "reward_model.ground_truth"))
    assert (record.answer, record.metadata) == ("42", {"source": "s"})


def test_a_field_with_a_dot_in_its_name_wins_over_nesting() -> None:
    row = {"prompt": "p", "a.b": "flat", "a": {"b": "nested"}}
    assert parse(row, Fields("prompt", "a.b")).answer == "flat"


def test_a_pattern_finds_the_answer_behind_its_reasoning() -> None:
    row = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 #\n48+24 = 72\n#### 1,072 \n"}
    assert parse(row, GSM8K).answer == "1,072"


def test_a_pattern_without_a_group_takes_all_that_it_matches() -> None:
    fields = Fields("prompt", "answer", re.compile(r"\d+$"))
    assert parse({"prompt": "p", "answer": "12 and 34"}, fields).answer == "34"


@pytest.mark.parametrize("answer", ["no mark here", "#### ", ""])
def test_a_pattern_that_finds_nothing_is_an_error(answer: str) -> None:
    with pytest.raises(DataError, match=r"line 7: field 'answer': prompts.answer_pattern '####.*' has no match in"):
        parse({"question": "q", "answer": answer}, GSM8K)


def test_a_conversation_asks_all_but_the_system_message() -> None:
    turns = [("system", "s"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    record = parse({"prompt": [{"role": r, "content": c, "name": None} for r, c in turns], "answer": "a"})
    assert record.question == "one\n\ntwo\n\nthree"
    assert record.prompt[0] == {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "expected an object with fields, found list"),
        ({"answer": "a"}, r"no field 'prompt' \(prompts.prompt_field\); the record has \['answer'\]"),
        ({"prompts": "p", "answer": "a"}, "did you mean 'prompts'"),
        ({"prompt": "p"}, r"no field 'answer' \(prompts.answer_field\)"),
        ({"prompt": "p", "answer": None}, "answer must be a text or a number, found nothing"),
        ({"prompt": "p", "answer": {"x": 1}}, "a dotted name reaches into nested objects"),
        ({"prompt": " \n", "answer": "a"}, "the prompt is empty"),
        ({"prompt": 3, "answer": "a"}, "expected a text or a list of messages, found int"),
        ({"prompt": [], "answer": "a"}, "list of messages is empty"),
        ({"prompt": ["hello"], "answer": "a"}, "message 0: expected an object with role and content"),
        ({"prompt": [{"role": "user"}], "answer": "a"}, "message 0: role must be a text, and content a text or a l"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "a"}, "the last message is of the role"),
    ],
)
def test_a_bad_record_is_refused_with_its_place(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        parse(row)
    assert str(refusal.value).startswith("f.jsonl, line 7: ")


def test_a_missing_file_is_named_in_full(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"there is no file {tmp_path}/none.jsonl"):
        read_records([tmp_path / "none.jsonl"], "jsonl", FIELDS)


def test_a_missing_file_suggests_the_one_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").touch()
    for wrong in ("gsm8k/trian.jsonl", "gsm8/train.jsonl"):
        with pytest.raises(DataError, match=rf"no file .*/{wrong}; did you mean {tmp_path}/gsm8k/train.jsonl\?"):
            read_records([tmp_path / wrong], "jsonl", FIELDS)


def test_a_directory_in_place_of_a_file_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path} is a directory, and a file is needed"):
        read_records([tmp_path], "jsonl", FIELDS)


def test_a_path_that_the_system_refuses_is_a_missing_file(tmp_path: Path) -> None:
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(DataError, match="there is no file"):
            read_records([tmp_path / name], "jsonl", FIELDS)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"prompt": "p", "answer": "a"})

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: .*Permission denied"):
        read_records([file], "jsonl", FIELDS)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="holds no records"):
        read_records([tmp_path / "empty.jsonl"], "jsonl", FIELDS)


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b'{"prompt": "p"', "not valid JSON"), (b'{"prompt": "\xff"}', r"not UTF-8: .* save the file as UTF-8")],
)
def test_a_line_that_is_not_json_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"prompt": "p", "answer": "a"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=f"bad.jsonl, line 3: {reason}"):
        read_records([file], "jsonl", FIELDS)


@pytest.mark.slow
def test_parquet_holds_the_same_records_as_jsonl(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"prompt": [{"role": "user", "content": f"q{n}"}], "reward_model": {"ground_truth": str(n)}, "level": n}
        for n in range(5)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", *rows)
    fields = Fields("prompt", "reward_model.ground_truth")
    of_parquet = read_records([tmp_path / "a.parquet"], "parquet", fields)
    of_jsonl = read_records([tmp_path / "a.jsonl"], "jsonl", fields)
    assert [(r.prompt, r.answer, r.metadata) for r in of_parquet] == [
        (r.prompt, r.answer, r.metadata) for r in of_jsonl
    ]
    assert of_parquet[3].place.endswith("a.parquet, row 3")


@pytest.mark.slow
def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_text("not parquet at all")
    with pytest.raises(DataError, match="not readable as parquet"):
        read_records([tmp_path / "a.parquet"], "parquet", FIELDS)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r"pip install 'darts-async\[data\]'"):
        read_records([tmp_path / "a.parquet"], "parquet", FIELDS)


# --- only what is used is touched, and all of it as it is ------------------------------------------------------


def test_metadata_fields_choose_what_the_reward_gets() -> None:
    row = {"prompt": "p", "answer": "a", "info": {"level": 3, "junk": "x"}, "junk": "y"}
    assert parse(row, Fields("prompt", "answer", metadata=("info.level",))).metadata == {"info.level": 3}
    assert parse(row, Fields("prompt", "answer", metadata=())).metadata == {}
    with pytest.raises(DataError, match=r"no field 'inf.level' \(prompts.metadata_fields\)"):
        parse(row, Fields("prompt", "answer", metadata=("inf.level",)))


def test_a_message_keeps_what_it_has_and_may_come_in_parts() -> None:
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3", "name": "add"},
    ]
    record = parse({"prompt": turns, "answer": "a"})
    assert record.prompt == (
        {"role": "user", "content": turns[0]["content"]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3", "name": "add"},
    )
    assert record.question == "one two\n\n3"
    with pytest.raises(DataError, match="content a text or a list of texts"):
        parse({"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}], "answer": "a"})


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "p", "answer": "a"})
    (tmp_path / "a.jsonl").write_text(row + "\n" + row, encoding="utf-8-sig")
    assert len(read_records([tmp_path / "a.jsonl"], "jsonl", FIELDS)) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_file_in_a_wide_encoding_says_how_to_change_it(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "answer": "a"}', encoding=encoding)
    with pytest.raises(DataError, match=r"a.jsonl, line 1: the file is UTF-16 or UTF-32; save it as UTF-8"):
        read_records([tmp_path / "a.jsonl"], "jsonl", FIELDS)


def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "\\ud800", "answer": "a"}')
    with pytest.raises(DataError, match=r"a.jsonl, line 1: not valid JSON: .*surrogates"):
        read_records([tmp_path / "a.jsonl"], "jsonl", FIELDS)


def test_what_is_no_number_stays_one_in_metadata_and_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "answer": "a", "x": NaN}')
    (record,) = read_records([tmp_path / "a.jsonl"], "jsonl", FIELDS)
    assert record.metadata["x"] != record.metadata["x"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "answer": NaN}')
    with pytest.raises(DataError, match=r"line 1: field 'answer': the answer is nan"):
        read_records([tmp_path / "a.jsonl"], "jsonl", FIELDS)


def write_odd_parquet(path: Path) -> None:
    """A column that Python cannot hold (a date in the year 292277), one of bytes, and one that is used."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "prompt": pyarrow.array(["p"]),
        "answer": pyarrow.array(["a"]),
        "level": pyarrow.array([3]),
        "far": pyarrow.array([2**62], pyarrow.timestamp("us")),
        "picture": pyarrow.array([b"\xff"]),
    }
    parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.slow
def test_a_parquet_column_that_is_not_used_is_not_touched(tmp_path: Path) -> None:
    write_odd_parquet(tmp_path / "a.parquet")
    (record,) = read_records([tmp_path / "a.parquet"], "parquet", Fields("prompt", "answer", metadata=("level",)))
    assert (record.prompt, record.answer, record.metadata) == ("p", "a", {"level": 3})


@pytest.mark.slow
def test_a_parquet_column_that_cannot_be_read_is_named_with_the_way_around_it(tmp_path: Path) -> None:
    write_odd_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: column 'far' cannot be read .* in prompts.metadata_fields"):
        read_records([tmp_path / "a.parquet"], "parquet", FIELDS)
