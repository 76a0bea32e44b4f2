"""Reward functions: what those that are built in want, and values held to one finite number."""

import math
import subprocess
import sys
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from darts_async.extensions import REWARD, load
from darts_async.reward.values import NotFiniteError, WrongTypeError, checked_reward

CHAIN = "darts_async.quickstart.task:reward"


def judge(name: str, response: str, answer: str, finish_reason: str = "stop") -> float:
    function = load(REWARD, name)
    reward: float = function(prompt="", response=response, answer=answer, metadata={}, finish_reason=finish_reason)
    return reward


# --- built in ------------------------------------------------------------------------------------------------


def test_chain_wants_the_right_answer_and_an_end() -> None:
    assert judge(CHAIN, "+5 2 ans 2", "2") == 1.0
    assert judge(CHAIN, "+5 2 ans 3", "2") == 0.0
    assert judge(CHAIN, "+5 2 ans 2", "2", finish_reason="length") == 0.0


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("  The\n Answer ", "the answer", 1.0),
        ("the answer.", "the answer", 0.0),
        ("", "", 1.0),
        ("straße", "STRASSE", 1),
    ],
)
def test_exact_match_ignores_case_and_white_space_alone(response: str, answer: str, reward: float) -> None:
    assert judge("exact_match", response, answer) == reward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"so it is \boxed{0.5}", r"\frac{1}{2}", 1.0),
        ("the answer is 1/2", "0.5", 1.0),
        (r"first $5$, no: $\sqrt{8}$", r"$2\sqrt{2}$", 1.0),
        (r"\boxed{x+1}", r"\boxed{1+x}", 1.0),
        (r"\boxed{3}", "4", 0.0),
        ("I do not know", "4", 0.0),
        (r"\boxed{\frac{1}{0}}", "4", 0.0),
        ("", "4", 0.0),
    ],
)
def test_math_compares_as_mathematics(response: str, answer: str, reward: float) -> None:
    assert judge("math", response, answer) == reward


@pytest.mark.slow
def test_math_refuses_an_answer_that_no_response_could_equal() -> None:
    with pytest.raises(ValueError, match="the reference answer '' is not a mathematical expression"):
        judge("math", "4", "")


@pytest.mark.slow
def test_the_quick_verifiers_do_not_load_the_slow_library() -> None:
    script = (
        "import sys, darts_async.reward.worker_pool; from darts_async.extensions import REWARD, load;"
        f"load(REWARD, {CHAIN!r}); print({{'torch', 'transformers', 'sympy'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


# --- values --------------------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False, allow_infinity=False, width=32) | st.integers(-(2**127), 2**127) | st.booleans())
def test_a_finite_number_is_a_reward(value: float) -> None:
    assert checked_reward(value) == float(value)


def test_a_number_beyond_float32_is_refused_because_it_would_travel_as_infinity() -> None:
    with pytest.raises(NotFiniteError, match="1e\\+39"):
        checked_reward(1e39)


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(3), np.bool_(True), np.array(0.5), np.array(1)])
def test_scalars_of_numpy_are_numbers(value: Any) -> None:
    assert checked_reward(value) == float(value)


def test_a_tensor_without_a_dimension_is_a_number() -> None:
    for value in (0.5, 3, True):
        assert checked_reward(torch.tensor(value)) == float(value)
    assert checked_reward(torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)) == 0.5
    with pytest.raises(NotFiniteError, match="must be finite, and Tensor"):
        checked_reward(torch.tensor(math.nan))
    with pytest.raises(WrongTypeError, match="must be a number, and Tensor"):
        checked_reward(torch.tensor([0.5]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, np.float32("nan")])
def test_what_is_not_finite_is_no_reward(value: Any) -> None:
    with pytest.raises(NotFiniteError, match="must be finite"):
        checked_reward(value)


@pytest.mark.parametrize("value", [None, "1.0", [1.0], 1j, Decimal(1), np.array([1.0]), np.array(1j), np.array("1.0")])
def test_what_is_not_a_number_is_called_a_wrong_type(value: Any) -> None:
    with pytest.raises(WrongTypeError, match=f"must be a number, and {type(value).__name__}"):
        checked_reward(value)
