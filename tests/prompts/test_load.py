"""From settings to prompts: tokens as the model wants them, two disjoint sets, and mistakes named."""

import datetime
import json
import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.config import ModelConfig, PromptsConfig, RunConfig
from darts_async.config.paths import expanded
from darts_async.errors import ConfigError, DataError, ModelError
from darts_async.models.location import load_tokenizer, resolve_model_path
from darts_async.prompts import record_sources
from darts_async.prompts.load import PromptSets, load_prompts, metadata_json, split_off, without_those_of
from darts_async.prompts.records import Record
from darts_async.prompts.source import Prompt
from tests.prompts.test_chat import CHATML
from tests.support.byte_tokenizer import make_byte_tokenizer, write_tokenizer


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(num_rows: int, word: str = "question") -> list[dict[str, Any]]:
    return [{"prompt": f"{word} {n}", "answer": str(n)} for n in range(num_rows)]


def run_config(model_dir: Path, *, seed: int = 0, **prompts: Any) -> RunConfig:
    return RunConfig(seed=seed, model=ModelConfig(path=str(model_dir)), prompts=PromptsConfig(**prompts))


def prompt(prompt_id: int, text: str) -> Prompt:
    return Prompt(prompt_id, text, np.array([1], np.int32), "")


# --- tokens --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tokens_equal_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model_dir = write_tokenizer(tmp_path / "model", chat_template=CHATML, adds_bos=True)
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "Grüße <|im_end|> 1+1", "answer": "2"}, *numbered(2)])
    sets = load_prompts(run_config(model_dir, source="jsonl", path=file, held_out=1, system_prompt="Be brief."))
    reference = AutoTokenizer.from_pretrained(model_dir)
    for each in (*sets.train, *sets.held_out):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": each.text}]
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert each.token_ids.tolist() == expected
        assert each.token_ids.dtype == np.int32


def test_special_tokens_are_added_once(tmp_path: Path) -> None:
    rows = [{"prompt": "hello", "answer": "a"}, {"prompt": "other", "answer": "a"}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    bos = make_byte_tokenizer().token_to_id("<|endoftext|>")
    for template in (None, "{{ bos_token }}{{ messages[0].content }}"):
        model_dir = write_tokenizer(tmp_path / str(template is None), chat_template=template, adds_bos=True)
        sets = load_prompts(run_config(model_dir, source="jsonl", path=file, held_out=1))
        for each in (*sets.train, *sets.held_out):
            assert each.token_ids.tolist().count(bos) == 1
            assert len(each.token_ids) == 6


def test_without_the_chat_template_a_text_is_tokenised_as_it_is(tmp_path: Path) -> None:
    model_dir = write_tokenizer(tmp_path, chat_template=CHATML)
    file = write_rows(tmp_path / "a.jsonl", numbered(2))
    sets = load_prompts(run_config(model_dir, source="jsonl", path=file, held_out=1, chat_template=False))
    (only,) = sets.train
    assert make_byte_tokenizer().decode(only.token_ids.tolist()) == only.text


def test_a_file_saved_with_truncation_and_padding_does_neither(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("abcdefghijkl")) == 12
    assert len(load_tokenizer(tmp_path).encode("ab")) == 2


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    model_dir = write_tokenizer(tmp_path)
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "x"}], "answer": "a"}])
    with pytest.raises(DataError, match=r"a.jsonl, line 1: the prompt is a list of messages, which needs a chat templ"):
        load_prompts(run_config(model_dir, source="jsonl", path=file, held_out=1))


def test_a_refusal_of_the_template_names_the_record(tmp_path: Path) -> None:
    model_dir = write_tokenizer(
        tmp_path, chat_template="{% if '1' in messages[0].content %}{{ raise_exception('no') }}{% endif %}x"
    )
    file = write_rows(tmp_path / "a.jsonl", numbered(3))
    with pytest.raises(DataError, match=r"a.jsonl, line 2: the chat template refuses the conversation: no"):
        load_prompts(run_config(model_dir, source="jsonl", path=file, held_out=1))


def test_two_system_messages_are_refused(tmp_path: Path) -> None:
    model_dir = write_tokenizer(tmp_path, chat_template=CHATML)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": messages, "answer": "a"}])
    with pytest.raises(DataError, match=r"line 1: .*unset prompts.system_prompt"):
        load_prompts(run_config(model_dir, source="jsonl", path=file, held_out=1, system_prompt="t"))


def test_a_system_prompt_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    model_dir = write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"prompts.chat_template is false"):
        load_prompts(run_config(model_dir, chat_template=False, system_prompt="t"))
    with pytest.raises(ModelError, match="has no chat template"):
        load_prompts(run_config(model_dir, system_prompt="t"))


def test_metadata_goes_to_the_reward_as_json(tmp_path: Path) -> None:
    record = Record(
        "a.jsonl, line 1", "p", "a", {"at": datetime.date(2026, 1, 2), "cost": Decimal("1.50"), "n": [1, None]}
    )
    assert json.loads(metadata_json(record)) == {"at": "2026-01-02", "cost": "1.50", "n": [1, None]}
    with pytest.raises(
        DataError, match=r"line 1: a field cannot be given .*: bytes has no form in JSON; .*metadata_fields"
    ):
        metadata_json(replace(record, metadata={"picture": b"x"}))


def test_template_arguments_reach_the_template(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    model_dir = write_tokenizer(tmp_path, chat_template=template)
    settings: dict[str, Any] = {"source": "jsonl", "path": write_rows(tmp_path / "a.jsonl", numbered(2)), "held_out": 1}
    decode = make_byte_tokenizer().decode
    (plain,) = load_prompts(run_config(model_dir, **settings)).train
    (silent,) = load_prompts(
        run_config(model_dir, **settings, chat_template_arguments={"enable_thinking": False})
    ).train
    assert decode(silent.token_ids.tolist()) == decode(plain.token_ids.tolist()) + "</think>"
    with pytest.raises(ConfigError, match=r"chat_template_arguments is set, but prompts.chat_template is false"):
        load_prompts(run_config(model_dir, **settings, chat_template=False, chat_template_arguments={"x": 1}))


def test_paths_may_have_a_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    write_tokenizer(tmp_path / "model")
    write_rows(tmp_path / "data" / "a.jsonl", numbered(3))
    config = RunConfig(
        model=ModelConfig(path="~/model"), prompts=PromptsConfig(source="jsonl", path="${DATA}/a.jsonl", held_out=1)
    )
    assert len(load_prompts(config).train) == 2
    with pytest.raises(
        ConfigError, match=r"model.path is '\$NOWHERE/x', but the environment variable NOWHERE is not set"
    ):
        resolve_model_path("$NOWHERE/x")


def test_two_dollar_signs_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRICE", "$5 $$")
    assert str(expanded("/$$PRICE/$PRICE/${PRICE}s$$", "runs_dir")) == "/$PRICE/$5 $$/$5 $$s$"


@pytest.mark.parametrize(("path", "named"), [("/${A:-b}/c", "${A:-b}"), ("/$", "$"), ("/${A", "${A"), ("/$/a", "$")])
def test_a_dollar_sign_of_no_variable_is_an_error_with_the_fix(path: str, named: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"runs_dir is {path!r}, but {named!r} names no variable: ")
    ) as error:
        expanded(path, "runs_dir")
    assert str(error.value).endswith("write $$ for a dollar sign")


# --- sets ----------------------------------------------------------------------------------------------------


def test_chain_prompts_carry_their_difficulty(tmp_path: Path) -> None:
    sets = load_prompts(run_config(write_tokenizer(tmp_path), num_train=20, held_out=5))
    assert (len(sets.train), len(sets.held_out)) == (20, 5)
    assert len({each.prompt_id for each in (*sets.train, *sets.held_out)}) == 25
    assert all(json.loads(each.metadata_json)["k"] >= 1 and each.answer.isdigit() for each in sets.train)


def test_the_quickstart_needs_no_settings_beyond_the_defaults() -> None:
    sets = load_prompts(RunConfig())
    assert (len(sets.train), len(sets.held_out), sets.counts.num_duplicates) == (4096, 128, 0)
    tokenizer = load_tokenizer(resolve_model_path("darts_async.quickstart:model"))
    assert all(tokenizer.decode(each.token_ids.tolist()) == each.text for each in sets.held_out)


def of_source(tmp_path: Path, name: str, **prompts: Any) -> PromptSets:
    config = run_config(write_tokenizer(tmp_path), seed=7, source=f"tests.fakes.sources:{name}", held_out=2, **prompts)
    return load_prompts(config)


def test_a_source_that_is_called_gives_records_of_which_some_are_held_out(tmp_path: Path) -> None:
    sets = of_source(tmp_path, "numbered", num_train=5)
    assert (len(sets.train), len(sets.held_out)) == (5, 2)
    assert {each.text for each in (*sets.train, *sets.held_out)} == {f"question {number}" for number in range(7)}
    assert sets.train[0].metadata_json == '{"seed": 7}'


def test_a_source_may_have_a_held_out_set_of_its_own(tmp_path: Path) -> None:
    sets = of_source(tmp_path, "two_sets", num_train=5, metadata_fields=())
    assert [each.text for each in sets.train] == [f"question {number}" for number in range(5)]
    assert all(each.text.startswith("other question") for each in sets.held_out)
    assert (len(sets.held_out), sets.held_out[0].metadata_json) == (2, "{}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong_names", r"gave sets named \['test', 'train'\]; name them 'train' and 'held_out'"),
        ("nothing", "gave no records of the set 'train'; give at least 1"),
        ("endless", "gave more than 100 records of the set 'train'; give at least 1, and come to an end"),
        ("no_answer", r"train record 0: no field 'answer' \(prompts.answer_field\).*did you mean 'anwser'"),
        ("texts", "train record 0: expected an object with fields, found str 'question'"),
        ("raises", "raised ConnectionError: the hub is down"),
        ("none", "raised TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_source_with_a_mistake_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(record_sources, "MAX_RECORDS", 100)
    with pytest.raises(DataError, match=f"prompts.source 'tests.fakes.sources:{name}',? {message}"):
        of_source(tmp_path, name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package:model", "no package 'no_such_package' is installed; write package:directory"),
        ("tests.no_such_package:model", "no package 'tests.no_such_package' is installed"),
        ("json.decoder:model", "no package 'json.decoder' is installed"),
        ("darts_async.quickstart:modle", "there is no directory .*modle; reinstall the package, or correct the name"),
    ],
)
def test_a_model_that_is_in_no_package_is_refused(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"model.path is '{path}', but {message}"):
        resolve_model_path(path)


def test_a_directory_with_a_colon_in_its_name_is_that_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("json:model").mkdir()
    assert resolve_model_path("json:model") == Path("json:model")


def test_held_out_prompts_depend_on_data_and_seed_alone(tmp_path: Path) -> None:
    model_dir = write_tokenizer(tmp_path)
    file = write_rows(tmp_path / "a.jsonl", numbered(50))

    def held_out_ids(seed: int, num_train: int | None) -> list[int]:
        config = run_config(model_dir, seed=seed, source="jsonl", path=file, held_out=8, num_train=num_train)
        return [each.prompt_id for each in load_prompts(config).held_out]

    assert held_out_ids(1, None) == held_out_ids(1, 5)
    assert held_out_ids(1, None) != held_out_ids(2, None)


def test_training_prompts_that_stand_in_the_held_out_file_are_removed_and_counted(tmp_path: Path) -> None:
    model_dir = write_tokenizer(tmp_path)
    train = write_rows(tmp_path / "train.jsonl", [*numbered(10), {"prompt": " question  3\n", "answer": "3"}])
    held_out = write_rows(tmp_path / "held_out.jsonl", [*numbered(4), {"prompt": "new", "answer": "x"}])
    config = run_config(model_dir, source="jsonl", path=train, held_out_path=held_out, held_out=5)
    sets = load_prompts(config)
    assert [each.answer for each in sets.train] == ["4", "5", "6", "7", "8", "9"]
    assert sets.counts.num_duplicates == 5
    assert [each.prompt_id for each in sets.held_out] == [11, 12, 13, 14, 15]


def test_num_train_takes_the_first_records(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", numbered(10))
    config = run_config(write_tokenizer(tmp_path), source="jsonl", path=file, held_out=2, num_train=3)
    sets = load_prompts(config)
    ids = [each.prompt_id for each in sets.train]
    assert ids == [n for n in range(10) if n not in {each.prompt_id for each in sets.held_out}][:3]


def test_long_prompts_are_refused_or_skipped_and_counted(tmp_path: Path) -> None:
    model_dir = write_tokenizer(tmp_path)
    file = write_rows(tmp_path / "a.jsonl", [*numbered(3), {"prompt": "x" * 21, "answer": "a"}])
    settings: dict[str, Any] = {"source": "jsonl", "path": file, "held_out": 1, "max_prompt_tokens": 20}
    with pytest.raises(DataError, match=r"line 4: the prompt has 21 tokens, but prompts.max_prompt_tokens is 20"):
        load_prompts(run_config(model_dir, **settings))
    sets = load_prompts(run_config(model_dir, **settings, on_too_long="skip"))
    assert (len(sets.train), len(sets.held_out), sets.counts.num_too_long) == (2, 1, 1)
    assert str(sets.counts) == "2 prompts to train on, 1 held out; 1 left out: longer than prompts.max_prompt_tokens"


def test_more_held_out_prompts_than_there_are_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", numbered(3))
    model_dir = write_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"prompts.held_out is 4, but there are only 3"):
        load_prompts(run_config(model_dir, source="jsonl", path=file, held_out=4))
    with pytest.raises(DataError, match="of 3 records there are 0 prompts to train on, "):
        load_prompts(run_config(model_dir, source="jsonl", path=file, held_out=3))
    write_rows(tmp_path / "a.jsonl", numbered(1) * 20)
    with pytest.raises(
        DataError, match=r"of 20 records .* 1 held out; 19 left out: also in the held-out set; give more"
    ):
        load_prompts(run_config(model_dir, source="jsonl", path=file, held_out=1))


@given(st.lists(st.integers(0, 5)), st.data(), st.integers(0, 2**32))
def test_a_split_keeps_every_prompt_once_and_in_order(words: list[int], data: st.DataObject, seed: int) -> None:
    prompts = [prompt(place, f"w {word}") for place, word in enumerate(words)]
    num_held_out = data.draw(st.integers(0, len(prompts)))
    others, held_out = split_off(prompts, num_held_out, seed)
    ids = [[each.prompt_id for each in part] for part in (others, held_out)]
    assert len(held_out) == num_held_out
    assert all(part == sorted(part) for part in ids)
    assert sorted(ids[0] + ids[1]) == list(range(len(prompts)))
    train_texts = {each.text for each in without_those_of(others, held_out)}
    assert train_texts.isdisjoint(each.text for each in held_out)


# --- models --------------------------------------------------------------------------------------------------


def test_a_model_path_that_is_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model_path(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["/no/such/model", "./nowhere", "a/b/c"])
def test_a_path_that_is_no_directory_never_asks_the_hub(path: str) -> None:
    with pytest.raises(ModelError, match=f"model.path is '{path}', but there is no directory /"):
        resolve_model_path(path)


@pytest.mark.slow
def test_a_hub_id_that_cannot_be_had_is_explained(tmp_path: Path) -> None:
    script = """
from darts_async.errors import ModelError
from darts_async.models.location import resolve_model_path
try:
    resolve_model_path("no-such-organisation/model")
except ModelError as error:
    print(error)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert "model.path is 'no-such-organisation/model': it is not a local directory" in done.stdout
    assert "could not be loaded from the hub" in done.stdout


def test_a_missing_tokenizer_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer.json.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_loading_imports_neither_torch_nor_transformers() -> None:
    script = "import sys, darts_async.prompts.load; print({'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
