"""What the prompts are to the model: lengths, unknown tokens, the first prompt; and what a reward gives its answer."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from darts_async.config import RunConfig
from darts_async.extensions import REWARD, REWARDS
from darts_async.prompts.load import PromptSets
from darts_async.prompts.source import Prompt
from launcher.preflight.prompt_check import look_at_prompts
from launcher.preflight.prompt_figures import PromptFigures, figures_of, unknown_id, unknown_tokens
from launcher.preflight.reward_trial import RewardTrial, doubts, try_reward


def words_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<|user|>", special=True)])
    return tokenizer


def sets_of(*texts: str, num_too_long: int = 0) -> PromptSets:
    tokenizer = words_tokenizer()
    prompts = tuple(
        Prompt(number, text, np.array(tokenizer.encode(text).ids, np.int32), "2", '{"source": 7}')
        for number, text in enumerate(texts)
    )
    return PromptSets(prompts, (), num_too_long, 0)


def figures(*texts: str, num_too_long: int = 0) -> PromptFigures:
    return figures_of(sets_of(*texts, num_too_long=num_too_long), words_tokenizer(), limit=8)


def test_lengths_are_those_of_the_tokens() -> None:
    found = figures("<|user|> one two", "one", "one one", num_too_long=1)
    assert (found.shortest, found.median, found.longest, found.limit) == (1, 2, 3, 8)
    assert found.over_limit_share == 0.25


def test_the_first_prompt_keeps_its_special_tokens() -> None:
    found = figures("<|user|> one two", "two")
    assert (found.first_text, found.first_tokens) == ("<|user|> one two", 3)


def test_a_prompt_of_which_nothing_is_known_is_counted_without_its_special_tokens() -> None:
    found = figures("<|user|> drei vier", "one fünf", "one two")
    assert found.num_all_unknown == 1
    assert found.unknown_share == pytest.approx(3 / 7)
    (hint,) = unknown_tokens(found, 3, "a-model")
    assert hint.is_hint
    assert "does not know 43% of the tokens of the prompts, and nothing at all of 1 of 3 prompts" in hint.message


def test_known_prompts_are_not_told_of() -> None:
    assert [*unknown_tokens(figures("one", "one two"), 2, "a-model")] == []


def test_a_tokenizer_that_knows_everything_has_no_unknown_token() -> None:
    assert unknown_id(Tokenizer(models.BPE())) is None
    assert unknown_id(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))) == 0


def test_too_long_prompts_are_counted_where_the_first_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "1 " * n, "answer": "1"}) + "\n" for n in range(1, 11)))
    prompts = {"source": "jsonl", "path": str(path), "held_out": 1, "max_prompt_tokens": 7}
    (problem,) = look_at_prompts(RunConfig.model_validate({"prompts": prompts})).problems
    assert "the prompt has 8 tokens" in problem.message
    assert "3 of 10 prompts (30.0%) are over the limit: they have 1 to 10 tokens" in problem.message


def trial_of(function: object) -> RewardTrial:
    assert callable(function)
    return try_reward("mine:f", function, figures("one"))


def test_a_reward_is_called_as_a_run_calls_it() -> None:
    seen: list[dict[str, object]] = []

    def reward(**sample: object) -> float:
        seen.append(sample)
        return float(sample["response"] == sample["answer"])

    trial = trial_of(reward)
    assert str(trial) == "1 for the reference answer '2', 0 for an empty response"
    rest = {"prompt": "one", "answer": "2", "metadata": {"source": 7}, "finish_reason": "stop"}
    assert seen == [rest | {"response": ""}, rest | {"response": "2"}]
    assert [*doubts(REWARD, trial)] == []


def test_an_answer_that_counts_in_a_box_is_right() -> None:
    trial = trial_of(lambda response, **_: float(response == r"\boxed{2}"))
    assert (trial.with_answer, trial.is_boxed, trial.with_nothing) == (1.0, True, 0.0)
    assert [*doubts(REWARD, trial)] == []


def test_equal_rewards_are_a_hint() -> None:
    (hint,) = doubts(REWARD, trial_of(lambda **_: 0.5))
    assert hint.is_hint
    assert hint.message == "gives 0.5 for the reference answer '2' and for an empty response alike"


def test_a_reward_that_fails_is_a_hint_with_its_words() -> None:
    (hint,) = doubts(REWARD, trial_of(lambda response, **_: 1.0 / len(response)))
    assert hint.is_hint
    assert "no reward (ZeroDivisionError: float division by zero) for an empty response" in hint.message
    (hint,) = doubts(REWARD, trial_of(lambda **_: "yes"))
    assert "the reward must be a number" in hint.message


def test_functions_of_batches_and_coroutine_functions_are_tried_too() -> None:
    def batch(*, responses: list[str], answers: list[str], **_: object) -> list[float]:
        return [float(response == answer) for response, answer in zip(responses, answers, strict=True)]

    async def asked(*, response: str, answer: str, **_: object) -> float:
        return float(response == answer)

    found = figures("one")
    for trial in (try_reward("a:b", batch, found, "batch"), try_reward("a:b", asked, found)):
        assert (trial.with_answer, trial.with_nothing) == (1.0, 0.0)


def test_a_function_gets_only_prompts_that_it_scores() -> None:
    config = RunConfig.model_validate({"reward": {"function": "math"}})
    found = figures("one")
    assert found.is_scored_by(REWARD, "math", config)
    assert not found.is_scored_by(REWARDS["sample"], "math", config), "it is not one of several"
    of_part = msgspec.structs.replace(found, own_reward="a:b")
    assert of_part.is_scored_by(REWARD, "a:b", config)
    assert not of_part.is_scored_by(REWARD, "math", config)
