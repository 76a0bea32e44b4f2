"""Settings that are laid over those of a run's file: by further files, and by words of the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from darts_async.config import RunConfig
from launcher.config_file import load_config
from launcher.problems import InputError, Problem
from launcher.settings_tree import Overrides, read_tree

FILE = """\
name: base
learner: &learner {steps: 10, learning_rate: 1e-5}
shaping:
  rule: none
  launch: 8
  keep: 8
"""
OWN = Path("run.yaml")


def tree(*words: str, more: str | None = None, base: str = FILE) -> dict[str, Any]:
    return read_tree([(OWN, base), *([(Path("more.yaml"), more)] if more else [])], words).values


def problem(tmp_path: Path, *words: str, more: str | None = None) -> Problem:
    file, second = tmp_path / "run.yaml", tmp_path / "more.yaml"
    file.write_text(FILE)
    second.write_text(more or "{}")
    with pytest.raises(InputError) as caught:
        load_config(file, Overrides((second,) if more else (), words))
    [found] = caught.value.problems
    return found


def test_a_word_replaces_one_setting_and_leaves_the_others() -> None:
    assert tree("learner.steps=200")["learner"] == {"steps": 200, "learning_rate": 1e-5}


def test_values_of_words_are_yaml() -> None:
    words = ["a=5e-4", "b=true", "c=[1, x]", "d={e: 1}", "f=", "g=null", "h='7'", "i=x=y", "j=~/x:y"]
    expected = {
        "a": 5e-4,
        "b": True,
        "c": [1, "x"],
        "d": {"e": 1},
        "f": None,
        "g": None,
        "h": "7",
        "i": "x=y",
        "j": "~/x:y",
    }
    values = tree(*words)
    assert {key: values[key] for key in expected} == expected


def test_later_words_win_and_words_win_over_files() -> None:
    values = tree("seed=2", "seed=3", more="seed: 1\nname: more\nlearner: {steps: 7}\n")
    assert (values["seed"], values["name"]) == (3, "more")
    assert values["learner"] == {"steps": 7, "learning_rate": 1e-5}


def test_a_list_and_a_value_replace_and_a_section_is_merged() -> None:
    assert tree("learner=null")["learner"] is None
    assert tree("x=[3]", base=FILE + "x: [1, 2]\n")["x"] == [3]
    assert tree("name.first=1")["name"] == {"first": 1}


def test_a_section_that_comes_by_alias_or_merge_key_is_merged_and_its_anchor_is_not_changed() -> None:
    values = tree("other.steps=3", "third.steps=4", base=FILE + "other: *learner\nthird: {<<: *learner, seed: 1}\n")
    assert values["other"] == {"steps": 3, "learning_rate": 1e-5}
    assert values["third"] == {"steps": 4, "learning_rate": 1e-5, "seed": 1}
    assert values["learner"] == {"steps": 10, "learning_rate": 1e-5}


Tree = st.recursive(
    st.integers(-5, 5) | st.none(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8
)
Mapping = st.dictionaries(st.sampled_from("abc"), Tree)


def laid_over(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {key: laid_over(base[key], value) if key in base else value for key, value in over.items()}


@given(base=Mapping, over=Mapping)
def test_files_are_merged_as_nested_dictionaries_are(base: dict[str, Any], over: dict[str, Any]) -> None:
    merged = read_tree([(OWN, yaml.safe_dump(base)), (Path("more.yaml"), yaml.safe_dump(over))], ())
    assert merged.values == laid_over(base, over)


@pytest.mark.parametrize("word", ["steps", "=1", "learner.=1", ".steps=1", "a..b=1", "--x"])
def test_a_word_that_is_not_a_setting_is_refused(tmp_path: Path, word: str) -> None:
    found = problem(tmp_path, word)
    assert found.place == word
    assert "section.setting=value" in str(found.fix)


@pytest.mark.parametrize("value", ["[1", "*x", "'a", "{a: }}", "a: b: c", "&x [*x]", "@x", "9" * 30, '"\\ud83d"'])
def test_a_value_that_is_not_yaml_is_refused_with_its_name(tmp_path: Path, value: str) -> None:
    found = problem(tmp_path, f"learner.steps={value}")
    assert (found.place, found.origin) == ("learner.steps", "from the command line")


def test_a_problem_names_where_its_value_was_written(tmp_path: Path) -> None:
    wrong = problem(tmp_path, "learner.stesp=3")
    assert (wrong.origin, wrong.fix) == ("from the command line", "did you mean learner.steps?")
    wrong = problem(tmp_path, more="seed: 1\nlearner:\n  steps: many\n")
    assert wrong.origin == f"line 3 of {tmp_path / 'more.yaml'}"
    wrong = problem(tmp_path, "learner.steps=many", more="learner: {steps: 3}\n")
    assert (wrong.value, wrong.origin) == ("'many'", "from the command line")
    wrong = problem(tmp_path, "name=7")
    assert wrong.fix == "put it in two pairs of quotes: name='\"7\"'"
    wrong = problem(tmp_path, more="seed: 1\nseed: 2\n")
    assert wrong.origin == f"line 2 of {tmp_path / 'more.yaml'}"


def test_a_rule_between_settings_names_the_section_of_the_file(tmp_path: Path) -> None:
    assert problem(tmp_path, "shaping.keep=9").line == 3


def test_a_second_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(FILE)
    with pytest.raises(InputError, match="there is no such file") as caught:
        load_config(tmp_path / "run.yaml", Overrides((tmp_path / "no.yaml",)))
    assert caught.value.file == tmp_path / "no.yaml"


def words_of(place: str, value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return [word for key, inner in value.items() for word in words_of(f"{place}.{key}" if place else key, inner)]
    return [f"{place}={json.dumps(value)}"]


def test_any_setting_of_a_configuration_can_be_given_as_a_word() -> None:
    settings = RunConfig().model_dump(mode="json")
    assert read_tree([(OWN, "name: x")], tuple(words_of("", settings))).values == settings


def test_a_word_that_is_not_a_number_is_not_said_to_have_quotes(tmp_path: Path) -> None:
    assert problem(tmp_path, "learner.steps=many").fix is None
    assert problem(tmp_path, "learner.learning_rate=5e-4x").fix is None
    assert problem(tmp_path, "learner.steps='7'").fix == "write it without quotes"
