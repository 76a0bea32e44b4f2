"""The race with another trainer: both run the same task, and the clock is read fairly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.peers import OURS, Climb, config_of, main, ours, reward_function, settings_of
from darts_async.models import resolve_model_path
from darts_async.quickstart.evaluate import sample_prompts
from darts_async.quickstart.task import make_prompts
from darts_async.quickstart.tokenizer import EOS_ID, build_tokenizer

MODEL = resolve_model_path("quickstart")


def test_a_run_ends_where_it_is_there_first() -> None:
    climb = Climb("ours", 0, [(0.0, 0, 0.5), (10.0, 10, 0.91), (20.0, 20, 0.89), (30.0, 30, 0.95)])
    assert climb.reached(0.9) == (10.0, 10, True)
    assert climb.reached(0.5) == (0.0, 0, True)
    assert climb.reached(0.99) == (30.0, 30, False)


@pytest.mark.parametrize("name", OURS)
def test_ours_are_valid_runs_with_what_the_other_trains_on(name: str) -> None:
    config = config_of(settings_of(OURS[name], 3, 20))
    assert (config.seed, config.learner.steps, config.learner.groups_per_step, config.shaping.keep) == (3, 20, 16, 8)


def test_the_other_trainer_gets_the_reward_of_the_task() -> None:
    tokenizer = build_tokenizer()
    judge = reward_function(Path(MODEL))
    right, wrong = (tokenizer.encode(f"+5 2 ans {answer}").ids for answer in (2, 3))
    assert judge([[*right, EOS_ID], right, [*wrong, EOS_ID], []], ["2", "2", "2", "2"]) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.slow
def test_rewards_are_those_of_the_prompts_in_their_order() -> None:
    torch.manual_seed(0)
    prompts = [(prompt.text, prompt.answer) for prompt in make_prompts(0, 6, seed=1)[1]]
    impossible = [(text, answer if index % 2 else "none") for index, (text, answer) in enumerate(prompts)]
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    rewards = sample_prompts(model, Path(MODEL), impossible, num_samples=8, max_new_tokens=64).rewards
    assert rewards.shape == (6, 8)
    assert not rewards[::2].any()
    assert np.count_nonzero(rewards[1::2]) > 3


@pytest.mark.slow
def test_a_run_is_evaluated_by_its_checkpoints() -> None:
    climb = ours("darts_async, no shaping", 0, 20)
    assert [steps for _, steps, _ in climb.rewards] == [0, 10, 20]
    (began_s, _, before), (first_s, _, _), (last_s, _, after) = climb.rewards
    assert 0 == began_s < first_s < last_s
    assert 0.4 < before < after


def test_fewer_steps_than_between_two_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["peers", "--steps", "4"])
    with pytest.raises(SystemExit):
        main()
    assert "--steps 4: the held-out reward is looked at every 10 steps" in capsys.readouterr().err
