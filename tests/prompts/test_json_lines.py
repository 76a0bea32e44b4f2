"""Lines of JSON: a field that is not used may hold what Python's json does not read; one that is used is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.errors import DataError
from darts_async.prompts.json_lines import decode_line, members
from darts_async.prompts.records import Fields, read_records

DEEP = "[" * 100_000 + '{"a": "]}"}' + "]" * 100_000
HUGE = "1" * 5_000
PLACE = "a.jsonl, line 3"
texts = st.text(st.characters(codec="utf-8"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | st.sampled_from(['"', "\\", "]}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)
spacings = st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " :\r\n ")])


def written(row: Any, spacing: tuple[str, str], is_ascii: bool = True) -> str:
    return json.dumps(row, separators=spacing, ensure_ascii=is_ascii)


def read_all(text: str) -> dict[str, Any]:
    return {name: json.loads(value) for name, value in members(text)}


@pytest.mark.slow
@given(st.dictionaries(texts, values, max_size=5), spacings, st.booleans())
def test_an_object_is_split_as_json_reads_it(row: dict[str, Any], spacing: tuple[str, str], is_ascii: bool) -> None:
    text = f" {written(row, spacing, is_ascii)}\n"
    assert list(read_all(text).items()) == list(row.items())


@pytest.mark.slow
@given(st.dictionaries(texts, values, min_size=1, max_size=4), spacings, st.data())
def test_what_is_used_is_what_json_reads_beside_a_field_that_it_does_not_read(
    row: dict[str, Any], spacing: tuple[str, str], data: st.DataObject
) -> None:
    used = data.draw(st.lists(st.sampled_from(sorted(row)), min_size=1))
    odd = data.draw(st.sampled_from([DEEP, HUGE]))
    line = '{"un\\u0075sed": ' + odd + spacing[0] + written(row, spacing)[1:]
    if "unused" not in row:
        decoded = decode_line(line.encode(), PLACE, used)
        assert {name: decoded[name] for name in used} == {name: row[name] for name in used}


@given(st.text('{}[]:,"\\ a1', max_size=12))
def test_a_line_that_is_not_an_object_is_never_split(text: str) -> None:
    try:
        row = json.loads(text)
    except ValueError:
        row = None
    if isinstance(row, dict):
        assert read_all(text) == row
    else:
        with pytest.raises(ValueError, match=r"."):
            read_all(text)


@pytest.mark.parametrize("odd", [DEEP, HUGE, '"\\ud800"'], ids=["deep", "huge", "half a pair"])
def test_an_unused_field_may_hold_anything(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "p", "x": ' + odd + ', "reward": {"log": ' + odd + ', "truth": "t"}, "k": 1}\n')
    (record,) = read_records([path], "jsonl", Fields("q", "reward.truth", metadata=("k",)))
    assert (record.prompt, record.answer, record.metadata) == ("p", "t", {"k": 1})


@pytest.mark.parametrize(
    ("odd", "reason"), [(DEEP, "is nested too deeply to be read"), (HUGE, "holds a number that cannot be read: ")]
)
def test_a_field_that_is_used_is_named_with_the_fix(odd: str, reason: str) -> None:
    line = ('{"q": "p", "x": ' + odd + "}").encode()
    with pytest.raises(
        DataError, match=rf"{PLACE}: field 'x' {reason}.*; .* list the needed .* in prompts.metadata_fields"
    ):
        decode_line(line, PLACE, None)
    with pytest.raises(DataError, match=rf"{PLACE}: field 'x' {reason}.*; shorten it, or remove the record"):
        decode_line(line, PLACE, ("q", "x"))
    with pytest.raises(DataError, match=rf"{PLACE} {reason}"):
        decode_line(odd.encode(), PLACE, ("q",))


@pytest.mark.parametrize(
    "line",
    [
        '{"x": ' + DEEP,
        '{"x": ' + DEEP[:-1] + "}",
        '{"x": ' + DEEP + ', "y"}',
        '{"x": ' + DEEP + ', "y": }',
        '{"x": ' + DEEP + ', "y": "',
        '{"x": ' + DEEP + "} {}",
        '{"x": ' + DEEP + ", y: 1}",
    ],
)
def test_a_line_that_is_cut_or_torn_is_no_json(line: str) -> None:
    with pytest.raises(DataError, match=rf"{PLACE}: not valid JSON: .*character"):
        decode_line(line.encode(), PLACE, ("q",))


def test_what_can_be_read_and_not_written_is_named() -> None:
    """Reading and writing reach different depths."""
    errors = []
    for depth in range(850, 1_100):
        line = '{"q": "\\u0061", "x": ' + "[" * depth + "]" * depth + "}"
        try:
            decode_line(line.encode(), PLACE, None)
        except DataError as error:
            errors.append(str(error))
    assert errors
    assert all("nested too deeply to be" in error for error in errors)
