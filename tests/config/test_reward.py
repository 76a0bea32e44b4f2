"""Settings of the reward: one function or several, and what is refused with which words."""

from typing import Any

import pytest
from pydantic import ValidationError

from darts_async.config.reward import RewardConfig


def refusal(**settings: Any) -> str:
    with pytest.raises(ValidationError) as refused:
        RewardConfig.model_validate(settings)
    [error] = refused.value.errors()
    return str(error["ctx"]["error"]) if "ctx" in error and "error" in error["ctx"] else str(error["msg"])


def test_one_function_is_the_default_and_has_no_curve_of_its_own() -> None:
    config = RewardConfig()
    assert (config.function, config.functions, config.labels) == ("darts_async.quickstart.task:reward", (), ())


def test_several_functions_take_the_place_of_the_default() -> None:
    two = [{"function": "math"}, {"function": "mine:brief", "weight": -0.5, "name": "brevity", "takes": "batch"}]
    config = RewardConfig.model_validate({"functions": two})
    assert (config.function, config.labels, config.names) == (None, ("math", "brevity"), ("math", "mine:brief"))


def test_settings_that_are_written_out_are_read_again_as_they_were() -> None:
    for settings in ({}, {"functions": [{"function": "mine:f"}]}, {"function": "math"}):
        config = RewardConfig.model_validate(settings)
        assert RewardConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"function": "math", "functions": [{"function": "a:b"}]}, "move the first into the second, as `- function: m"),
        ({"function": None}, "reward.function is null and reward.functions is empty"),
        ({"functions": [{"function": "a:f"}, {"function": "b:f"}]}, "two with the name 'f'; give each a `name`"),
        ({"functions": [{"function": "maths"}]}, "reward.functions is 'maths'; use one of 'exact_match', 'math'"),
        ({"functions": [{"function": "math", "takes": "batch"}]}, "'math' takes a sample, and `takes` is 'batch'"),
        (
            {"functions": [{"function": "a:f", "code": {}}]},
            "has one of `function`, `code` and `judge`, and one has 'function' and",
        ),
        ({"functions": [{"weight": 1.0}]}, "`judge`, and one has none of them"),
        ({"functions": [{"code": {}, "takes": "batch"}]}, "'code' takes a sample, and `takes` is 'batch'"),
        ({"functions": [{"code": {}}], "deadline_s": 8.0}, "total_s of `code` is 8, but a response has no"),
        ({"functions": [{"function": "a:f", "weight": float("nan")}]}, "finite number"),
        ({"functions": [{"function": "a:f", "name": "two words"}]}, "match pattern"),
    ],
)
def test_what_is_refused_names_the_value_and_the_fix(settings: dict[str, Any], said: str) -> None:
    assert said in refusal(**settings)
