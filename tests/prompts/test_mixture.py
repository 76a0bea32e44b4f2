"""Mixtures: parts with their own settings and weights, disjoint from all that is held out; sets to evaluate on."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from darts_async.config import RunConfig
from darts_async.errors import DataError
from darts_async.prompts.load import PromptSets, load_prompts
from tests.support.byte_tokenizer import write_tokenizer


def part(folder: Path, name: str, *numbers: int, word: str | None = None, **settings: Any) -> dict[str, Any]:
    """A part that is a file of these numbers."""
    rows = [{"q": f"{word or name} {number}", "answer": number} for number in numbers]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": name, "source": "jsonl", "path": str(file), "prompt_field": "q", "held_out": 1} | settings


def loaded(folder: Path, mixture: list[dict[str, Any]], *sets: dict[str, Any]) -> PromptSets:
    model = {"path": str(write_tokenizer(folder / "model"))}
    given = {"model": model, "prompts": {"mixture": mixture}, "evaluation": {"sets": list(sets)}}
    return load_prompts(RunConfig.model_validate(given))


def test_each_part_is_split_and_drawn_by_its_weight(tmp_path: Path) -> None:
    few = part(tmp_path, "few", *range(3), weight=3.0)
    many = part(tmp_path, "many", *range(100), weight=1.0, held_out=10, num_train=40)
    sets = loaded(tmp_path, [few, many])
    assert Counter(prompt.part for prompt in sets.train) == {"few": 2, "many": 40}
    assert Counter(prompt.part for prompt in sets.held_out) == {"few": 1, "many": 10}
    ids = [prompt.prompt_id for prompt in (*sets.train, *sets.held_out)]
    assert len(ids) == len(set(ids))
    source = sets.in_order(0)
    drawn = Counter(source.draw().part for _ in range(400))
    assert abs(drawn["few"] - 300) <= 4


def test_what_one_part_holds_out_no_part_trains_on(tmp_path: Path) -> None:
    first = part(tmp_path, "first", 1, 2, 3, 4, word="the", held_out=2)
    second = part(tmp_path, "second", 1, 2, 3, 4, 5, word="the", held_out=1)
    sets = loaded(tmp_path, [first, second])
    held_out = {prompt.text for prompt in sets.held_out}
    assert len(held_out) == len(sets.held_out) or len(sets.held_out) == 3
    assert not held_out & {prompt.text for prompt in sets.train}
    assert sets.num_duplicates > 0


def test_a_set_to_evaluate_on_is_named_and_never_trained_on(tmp_path: Path) -> None:
    shared = part(tmp_path, "train", *range(10), word="the", held_out=2)
    probe = part(tmp_path, "probe", 1, 2, 3, word="the", held_out=3)
    other = part(tmp_path, "other", *range(20), held_out=4)
    sets = loaded(tmp_path, [shared], probe, other)
    assert Counter(prompt.part for prompt in sets.held_out) == {"train": 2, "probe": 3, "other": 4}
    assert {prompt.part for prompt in sets.train} == {"train"}
    assert not {f"the {number}" for number in (1, 2, 3)} & {prompt.text for prompt in sets.train}
    assert sets.weights == {"train": 1.0}


def test_a_single_source_with_a_set_to_evaluate_on_keeps_its_order(tmp_path: Path) -> None:
    alone = part(tmp_path, "train", *range(10))
    del alone["name"]
    model = {"path": str(write_tokenizer(tmp_path / "model"))}
    plain = load_prompts(RunConfig.model_validate({"model": model, "prompts": alone}))
    given = {"model": model, "prompts": alone, "evaluation": {"sets": [part(tmp_path, "probe", 77)]}}
    probed = load_prompts(RunConfig.model_validate(given))
    assert [each.text for each in probed.train] == [each.text for each in plain.train]
    orders = [sets.in_order(3) for sets in (plain, probed)]
    assert [orders[0].draw().prompt_id for _ in range(20)] == [orders[1].draw().prompt_id for _ in range(20)]


@pytest.mark.parametrize(
    ("numbers", "held_out", "message"),
    [
        ((1,), 2, "held_out of 'b' is 2, but there are only 1 prompts"),
        ((1, 2), 2, "of 2 records of 'b' there are 0 prompts"),
    ],
)
def test_a_part_with_too_few_records_is_named(
    tmp_path: Path, numbers: tuple[int, ...], held_out: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, [part(tmp_path, "a", 1, 2, 3), part(tmp_path, "b", *numbers, held_out=held_out)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"prompts": {"mixture": [{"name": "a"}, {"name": "a"}]}},
            r"prompts.mixture.1 has the name 'a' in metrics, which is that of prompts.mixture.0; name one of them",
        ),
        (
            {"prompts": {"mixture": [{"name": "a"}], "held_out": 3}},
            "prompts.held_out is set, but so is prompts.mixture",
        ),
        ({"prompts": {"mixture": [{"name": "a", "source": "jsonl"}]}}, "source is 'jsonl', which needs path"),
        ({"prompts": {"mixture": [{"name": "a", "weight": 0.0}]}}, "greater than 0"),
        ({"prompts": {"mixture": [{"name": "a/b"}]}}, "should match pattern"),
        (
            {"evaluation": {"sets": [{"name": "a"}, {"name": "a"}]}},
            r"evaluation.sets.1 has the name 'a' in metrics, which is that of evaluation.sets.0",
        ),
        (
            {"prompts": {"mixture": [{"name": "a"}]}, "evaluation": {"sets": [{"name": "a"}]}},
            r"evaluation.sets.0 has the name 'a' in metrics, which is that of prompts.mixture.0",
        ),
        ({"evaluation": {"sets": [{"name": "prompts"}]}}, "which is that of the single source of a run"),
        (
            {
                "prompts": {"source": "reasoning_gym", "families": [{"name": "gcd"}]},
                "evaluation": {"sets": [{"name": "gcd"}]},
            },
            r"evaluation.sets.0 has the name 'gcd' in metrics, which is that of prompts.families",
        ),
        (
            {
                "prompts": {
                    "mixture": [
                        {"name": "a", "source": "reasoning_gym", "families": [{"name": "gcd"}]},
                        {"name": "a.gcd"},
                    ]
                }
            },
            r"prompts.mixture.1 has the name 'a.gcd' in metrics, which is that of prompts.mixture.0",
        ),
        (
            {
                "evaluation": {"sets": [{"name": "a", "reward": "math"}]},
                "reward": {"functions": [{"function": "exact_match"}]},
            },
            "reward.functions is set, but some prompts have a reward of their own",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(given)


def test_prompts_carry_the_reward_of_their_part_where_it_differs(tmp_path: Path) -> None:
    mixture = [part(tmp_path, "a", *range(4), reward="exact_match"), part(tmp_path, "b", *range(4), reward="math")]
    given = {
        "model": {"path": str(write_tokenizer(tmp_path / "model"))},
        "prompts": {"mixture": mixture},
        "evaluation": {"sets": [part(tmp_path, "c", 1)]},
        "reward": {"function": "math"},
    }
    config = RunConfig.model_validate(given)
    assert config.own_rewards == ("exact_match",)
    sets = load_prompts(config)
    found = {(prompt.part, prompt.reward) for prompt in (*sets.train, *sets.held_out)}
    assert found == {("a", "exact_match"), ("b", ""), ("c", "")}


def test_tasks_beside_other_records_bring_their_scorer() -> None:
    tasks = {"name": "tasks", "source": "reasoning_gym", "families": [{"name": "gcd"}]}
    config = RunConfig.model_validate({"prompts": {"mixture": [tasks, {"name": "b"}]}})
    assert config.own_rewards == ("reasoning_gym",)
    alone = RunConfig.model_validate({"prompts": {"mixture": [tasks]}})
    assert (alone.reward.function, alone.own_rewards) == ("reasoning_gym", ())


def test_a_mixture_survives_being_written_and_read() -> None:
    parts = [{"name": "a", "weight": 2.0}, {"name": "b", "source": "hub", "path": "x/y", "metadata_fields": ["z"]}]
    config = RunConfig.model_validate({"prompts": {"mixture": parts}, "evaluation": {"sets": [{"name": "c"}]}})
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert [*config.record_sections] == ["prompts.mixture.0", "prompts.mixture.1", "evaluation.sets.0"]


def drawn(*, num_train: int | None, held_out: int, seed: int) -> list[dict[str, str]]:
    """A source that draws its records, as many do."""
    rng = random.Random(seed)
    return [{"prompt": f"{rng.randrange(10**9)}", "answer": "1"} for _ in range((num_train or 8) + held_out)]


def test_a_set_of_the_same_function_is_not_made_of_the_records_to_train_on(tmp_path: Path) -> None:
    source = {"source": f"{__name__}:drawn", "held_out": 4}
    given = {
        "model": {"path": str(write_tokenizer(tmp_path / "model"))},
        "prompts": source | {"num_train": 32},
        "evaluation": {"sets": [source | {"name": "probe"}]},
    }
    sets = load_prompts(RunConfig.model_validate(given))
    assert Counter(prompt.part for prompt in sets.held_out)["probe"] == 4
    assert len(sets.train) == 32, "none was taken away for the set"
