"""What a run brings itself: found by name, and refused with the reason."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from darts_async.config import RunConfig
from darts_async.errors import ExtensionError
from darts_async.extensions import KINDS, REWARD, SINK, Kind, is_coroutine_function, load

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


@pytest.mark.parametrize(("name", "reward"), [("good", 1.0), ("takes_all", 1.0), ("instance", 0.5), ("bound", 1.0)])
def test_any_callable_of_the_right_shape_is_taken(user_module: str, name: str, reward: float) -> None:
    found = load(REWARD, f"{user_module}:{name}")
    assert found(prompt="", response="", answer="", metadata={}, finish_reason="stop") == reward


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("goood", "has no 'goood'; did you mean 'good'?"),
        ("nothing_like_it", "has no 'nothing_like_it'$"),
        ("constant", "is a int and cannot be called"),
        ("partial", r"takes \(prompt, response\): .* it is called as partial\(prompt=, response=, answer=, metadata="),
        ("in_parts", "is a generator function: it must return its result"),
        ("later_in_parts", "is a coroutine function"),
    ],
)
def test_what_cannot_be_called_is_refused(user_module: str, function: str, message: str) -> None:
    with pytest.raises(ExtensionError, match=message):
        load(REWARD, f"{user_module}:{function}")


@pytest.mark.parametrize("function", ["later", "later_instance"])
def test_a_reward_function_may_be_a_coroutine_function_and_nothing_else_may(user_module: str, function: str) -> None:
    found = load(REWARD, f"{user_module}:{function}")
    assert is_coroutine_function(found)
    arguments = dataclasses.replace(REWARD, may_be_async=False)
    with pytest.raises(ExtensionError, match="is a coroutine function"):
        load(arguments, f"{user_module}:{function}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "reward.function is 'maths'; use one of 'exact_match', 'math', 'reasoning_gym', or"),
        ("chian", "or module:name; did you mean 'darts_async.quickstart.task:reward'?"),
        ("chain", "'chain' is now called 'darts_async.quickstart.task:reward'; write that"),
        ("some_module:", "or module:name"),
        (":f", "or module:name"),
        ("no_such_module_at_all:f", "there is no module 'no_such_module_at_all'; looked in the current directory"),
        ("json.no_such_part:f", "there is no module 'json.no_such_part'"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, message: str) -> None:
    with pytest.raises(ExtensionError, match=re.escape(message)):
        load(REWARD, name)


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
    with pytest.raises(ExtensionError, match=message):
        load(REWARD, "broken_reward:f")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS.values() if kind is not SINK for name, target in kind.built_in.items() if target],
)
def test_every_built_in_name_can_be_loaded(kind: Kind, name: str) -> None:
    assert callable(load(kind, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", SINK.built_in)
def test_every_built_in_sink_can_be_loaded(name: str) -> None:
    """In a child: the packages of services make temporary files when they are imported."""
    code = f"from darts_async.extensions import SINK, load; assert callable(load(SINK, {name!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_kind_is_a_setting(kind: Kind) -> None:
    for name in kind.names_in(RunConfig()):
        assert kind.checked(name) == name


def test_only_what_the_user_brings_is_looked_for_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    load(REWARD, "exact_match")
    assert str(tmp_path) not in sys.path
