"""A learner that stands for accelerators takes the time that it was told, and changes nothing."""

import time

import pytest
import torch
from pydantic import ValidationError

from darts_async.config import LearnerConfig, RunConfig
from darts_async.learner.objective import ScriptedObjective
from darts_async.learner.ranks.rank_info import RankInfo
from tests.learner.world import make_group, make_trainer, packed_model


@pytest.fixture
def slept_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What it would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def test_it_takes_the_time_of_its_tokens_and_of_its_steps(slept_s: list[float]) -> None:
    trainer = make_trainer(script={"token_s": 0.5, "step_s": 7.0})
    trainer.add_groups([make_group([3, 3, 2, 2], rewards=[1.0, 1.0, 1.0, 1.0])])
    assert sum(slept_s) == 5.0
    slept_s.clear()
    metrics = trainer.finish_step()
    assert slept_s == [7.0]
    assert (metrics["tokens"], metrics["grad_norm"], trainer.policy_version) == (10.0, 0.0, 1)
    assert metrics["reward_mean"] == 1.0, "what is known of the groups is told as ever"


def test_ranks_share_the_tokens_and_not_the_time(slept_s: list[float]) -> None:
    config = LearnerConfig.model_validate({"script": {"token_s": 0.5}})
    second = ScriptedObjective(
        packed_model(), config, temperature=1.0, baseline="group", max_new_tokens=64, rank_info=RankInfo(1, 2)
    )
    second.backward([make_group([4, 4, 4, 4])], lambda: None)
    assert sum(slept_s) == 8.0, "half of the tokens at half the speed"


def test_the_model_stays_what_it_is() -> None:
    model = packed_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer = make_trainer(model, script={})
    trainer.add_groups([make_group([3, 2], rewards=[0.0, 1.0])])
    trainer.finish_step()
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


def test_nobody_trains_a_real_model_with_it() -> None:
    with pytest.raises(ValidationError, match=r"learner\.script is set.*generator\.engine embedded"):
        RunConfig.model_validate({"learner": {"script": {}}})
    RunConfig.model_validate({"learner": {"script": {}}, "generator": {"engine": "scripted", "script": {}}})
