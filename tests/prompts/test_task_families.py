"""Tasks of reasoning-gym: different questions, disjoint sets, the same ones again, and mistakes named."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from darts_async.config import RunConfig
from darts_async.config.prompts import FamilyConfig
from darts_async.errors import DataError
from darts_async.prompts import task_families
from darts_async.prompts.load import PromptSets, load_prompts
from darts_async.prompts.task_families import FamilyTasks, apportioned, make_tasks
from tests.prompts.test_chat import CHATML
from tests.support.byte_tokenizer import make_byte_tokenizer, write_tokenizer

SUMS = {"name": "chain_sum", "arguments": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}}
PRODUCTS = {"name": "products", "weight": 3.0, "arguments": {"min_digits": 1, "max_digits": 1}}


def made(
    *families: dict[str, Any], num_train: int = 20, held_out: int = 8, seed: int = 0, **more: Any
) -> list[FamilyTasks]:
    found = [FamilyConfig.model_validate(family) for family in families]
    return make_tasks(found, num_train=num_train, held_out=held_out, seed=seed, **more)


def settings(model_dir: Path | str, *families: dict[str, Any], **more: Any) -> RunConfig:
    asked = {"source": "reasoning_gym", "families": list(families), "num_train": 40, "held_out": 8}
    return RunConfig.model_validate({"model": {"path": str(model_dir)}, "prompts": asked | more})


def loaded(*arguments: Any, **more: Any) -> PromptSets:
    return load_prompts(settings(*arguments, **more))


@given(st.integers(0, 1000), st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8))
def test_shares_have_the_sum_and_are_nearly_in_proportion(total: int, weights: list[float]) -> None:
    shares = apportioned(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


@pytest.mark.slow
def test_families_become_prompts_with_the_chat_template_in_disjoint_sets(tmp_path: Path) -> None:
    sets = loaded(write_tokenizer(tmp_path, chat_template=CHATML), SUMS, PRODUCTS)
    assert Counter(prompt.part for prompt in sets.train) == {"chain_sum": 10, "products": 30}
    assert Counter(prompt.part for prompt in sets.held_out) == {"chain_sum": 2, "products": 6}
    assert sets.weights == {"chain_sum": 1.0, "products": 3.0}
    texts = [prompt.text for prompt in (*sets.train, *sets.held_out)]
    assert len(texts) == len(set(texts)) == 48
    first = sets.train[0]
    decoded = make_byte_tokenizer().decode(first.token_ids.tolist(), skip_special_tokens=False)
    assert f"<|im_start|>user\n{first.text}<|im_end|>" in decoded
    source = sets.in_order(0)
    drawn = Counter(source.draw().part for _ in range(400))
    assert abs(drawn["products"] - 300) < 5


@pytest.mark.slow
def test_held_out_tasks_are_the_same_for_any_number_of_training_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    (few,), (many,), (other,) = made(SUMS), made(SUMS, num_train=100), made(SUMS, seed=1)
    assert few.held_out == many.held_out != other.held_out
    assert few.train == many.train[:20]


@pytest.mark.slow
def test_a_set_to_evaluate_on_has_tasks_of_its_own(tmp_path: Path) -> None:
    wide = {"name": "chain_sum", "arguments": {"min_terms": 4, "max_terms": 6, "min_digits": 3, "max_digits": 5}}
    probe = {"name": "probe", "source": "reasoning_gym", "families": [wide], "held_out": 30}
    given = settings(write_tokenizer(tmp_path), wide).model_dump(mode="json") | {"evaluation": {"sets": [probe]}}
    sets = load_prompts(RunConfig.model_validate(given))
    assert Counter(prompt.part for prompt in sets.held_out) == {"chain_sum": 8, "probe": 30}
    assert (len(sets.train), sets.num_duplicates) == (40, 0)
    assert len({prompt.text for prompt in (*sets.train, *sets.held_out)}) == 78


@pytest.mark.slow
def test_a_set_to_evaluate_on_may_have_all_questions_of_its_family() -> None:
    (tasks,) = made(PRODUCTS, num_train=0, held_out=500)
    assert tasks.train == []
    assert 90 < len(tasks.held_out) <= 100


@pytest.mark.slow
def test_held_out_tasks_that_are_too_long_are_skipped(tmp_path: Path) -> None:
    sums = SUMS | {"arguments": {"min_terms": 2, "max_terms": 9, "min_digits": 1, "max_digits": 1}}
    probe = {"name": "probe", "source": "reasoning_gym", "families": [sums], "held_out": 20}
    short = {"on_too_long": "skip", "chat_template": False, "num_train": 40, "held_out": 20}
    model = write_tokenizer(tmp_path)

    def found(limit: int) -> PromptSets:
        given = settings(model, sums, **short, max_prompt_tokens=limit).model_dump(mode="json")
        return load_prompts(RunConfig.model_validate(given | {"evaluation": {"sets": [probe]}}))

    all_of_them = found(512)
    lengths = sorted(len(prompt.token_ids) for prompt in all_of_them.held_out)
    limit = lengths[len(lengths) // 2]
    skipped = found(limit)
    assert [each.text for each in skipped.held_out] == [
        each.text for each in all_of_them.held_out if len(each.token_ids) <= limit
    ]
    assert {each.part for each in skipped.held_out} == {"chain_sum", "probe"}
    with pytest.raises(DataError, match="none of the 20 held-out tasks of 'chain_sum' has a prompt of at most 1 token"):
        found(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["word_ladder", "isomorphic_strings", "polynomial_multiplication"])
def test_a_family_that_goes_through_sets_of_texts_gives_the_same_tasks_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        found.append(made({"name": name}, num_train=3, held_out=1))
    assert found[0] == found[1]
    assert os.environ["PYTHONHASHSEED"] == "2"


@pytest.mark.slow
def test_a_small_family_gives_what_it_has() -> None:
    (tasks,) = made(PRODUCTS, num_train=500, held_out=30)
    assert len(tasks.held_out) == 30
    assert 60 < len(tasks.train) <= 70


@pytest.mark.slow
def test_two_families_of_one_name_are_two_parts(tmp_path: Path) -> None:
    longer = {"name": "chain_sum", "arguments": {"min_terms": 5, "max_terms": 6}}
    assert [*loaded(write_tokenizer(tmp_path), SUMS, longer).weights] == ["chain_sum.0", "chain_sum.1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "message"),
    [
        ({"name": "chain_sums"}, "reasoning-gym has no family 'chain_sums'; did you mean 'chain_sum'"),
        ({"name": "q"}, "no family 'q'; it has ab, acre"),
        ({"name": "gcd", "arguments": {"max_valu": 3}}, "'gcd' has no argument 'max_valu'; did you mean 'max_value'"),
        ({"name": "gcd", "arguments": {"min_value": -3}}, "the family 'gcd' refuses its arguments"),
        ({"name": "rearc"}, "'rearc' cannot be used: its scorer gives 0.05 to its own answer"),
        (PRODUCTS | {"arguments": {"min_digits": 1, "max_digits": 1, "min_terms": 1, "max_terms": 1}}, "has only"),
    ],
)
def test_a_family_that_cannot_be_used_is_named(family: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(family, held_out=64)


@pytest.mark.slow
def test_a_family_that_searches_without_an_end_is_ended() -> None:
    endless = {"name": "base_conversion", "arguments": {"min_base": 2, "max_base": 2}}
    with pytest.raises(DataError, match="families base_conversion took longer than 6 s"):
        made(endless, deadline_s=6.0)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_families, "PACKAGE", "reasoning_gym_that_is_absent")
    with pytest.raises(DataError, match=r"needs the package reasoning-gym: pip install 'darts-async\[reasoning-gym\]'"):
        made(SUMS)


def test_the_scorer_of_the_families_is_the_reward_unless_one_is_set() -> None:
    given = settings("m", SUMS)
    assert given.reward.function == "reasoning_gym"
    assert RunConfig.model_validate_json(given.model_dump_json()) == given
    own = given.model_dump() | {"reward": {"function": "exact_match"}}
    assert RunConfig.model_validate(own).reward.function == "exact_match"
    assert RunConfig.model_validate({"prompts": {"source": "jsonl", "path": "x"}}).reward.function != "reasoning_gym"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"source": "reasoning_gym"}, "needs prompts.families"),
        ({"families": [SUMS]}, "prompts.families is set, which is of the source 'reasoning_gym'"),
        (
            {"source": "reasoning_gym", "families": [SUMS], "path": "x"},
            "prompts.path is set, but tasks are made, and no file is read",
        ),
        ({"source": "reasoning_gym", "families": [SUMS | {"weight": 0.0}]}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(prompts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({"prompts": prompts})
