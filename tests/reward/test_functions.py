"""Reward functions: found by name, refused with the reason, and their values held to one finite number."""

import math
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from darts_async.errors import RewardError
from darts_async.reward.loading import BUILT_IN, NotFiniteError, WrongTypeError, checked_reward, load_function

USER_MODULE = """
import functools
constant = 3
def good(*, prompt, response, answer, metadata, finish_reason): return 1.0
def takes_all(**fields): return 1.0
def partial(prompt, response): return 0.0
async def later(**fields): return 0.0
def in_parts(**fields): yield 0.0
async def later_in_parts(**fields): yield 0.0
class Later:
    async def __call__(self, **fields): return 0.0
later_instance = Later()
class Callable:
    def __call__(self, prompt, response, answer, metadata, finish_reason, extra=1): return 0.5
instance = Callable()
bound = functools.partial(good)
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory, with a name that no other test imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"user_module_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(USER_MODULE)
    return name


def judge(name: str, response: str, answer: str, finish_reason: str = "stop") -> float:
    function = load_function(name)
    return function(prompt="", response=response, answer=answer, metadata={}, finish_reason=finish_reason)


# --- built in ------------------------------------------------------------------------------------------------


def test_chain_wants_the_right_answer_and_an_end() -> None:
    assert judge("chain", "+5 2 ans 2", "2") == 1.0
    assert judge("chain", "+5 2 ans 3", "2") == 0.0
    assert judge("chain", "+5 2 ans 2", "2", finish_reason="length") == 0.0


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
        "import sys, darts_async.reward.worker_pool; from darts_async.reward.loading import load_function;"
        "load_function('chain'); print({'torch', 'transformers', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


# --- a user's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reward"), [("good", 1.0), ("takes_all", 1.0), ("instance", 0.5), ("bound", 1.0)])
def test_any_callable_of_the_right_shape_is_taken(user_module: str, name: str, reward: float) -> None:
    assert judge(f"{user_module}:{name}", "", "") == reward


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("goood", "has no 'goood'; did you mean 'good'?"),
        ("nothing_like_it", "has no 'nothing_like_it'$"),
        ("constant", "is a int and cannot be called"),
        ("partial", r"takes \(prompt, response\): .* it is called as partial\(prompt=, response=, answer=, metadata="),
        ("later", "is a coroutine function"),
        ("later_instance", "is a coroutine function"),
        ("in_parts", "is a generator function: it must return a number"),
        ("later_in_parts", "is a generator function"),
    ],
)
def test_what_cannot_be_called_is_refused(user_module: str, function: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_function(f"{user_module}:{function}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "maths",
            r"must be one of \['chain', 'exact_match', 'math'\] or have the form module:function; did you mean",
        ),
        ("some_module:", "have the form module:function"),
        (":f", "have the form module:function"),
        ("no_such_module_at_all:f", "there is no module 'no_such_module_at_all'; looked in the current directory"),
        ("json.no_such_part:f", "there is no module 'json.no_such_part'"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_function(name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys; sys.exit()", "importing .* raised SystemExit"),
        ("import sys; sys.exit(0)", "importing .* raised SystemExit: 0"),
        ("class Odd(BaseException): pass\nraise Odd('words')", "importing .* raised Odd: words"),
        ("import no_such_dependency", "importing .* raised ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("def f(:", "raised SyntaxError"),
        ("1 / 0", "raised ZeroDivisionError"),
    ],
)
def test_a_module_that_fails_to_import_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken_reward.py").write_text(source)
    with pytest.raises(RewardError, match=message):
        load_function("broken_reward:f")


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_name_can_be_loaded(name: str) -> None:
    assert callable(load_function(name))


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
