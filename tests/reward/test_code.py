"""Programs in responses: which one is run, what passes, and what is no reward at all."""

import json
import sys
from typing import Any

import msgspec
import pytest

from darts_async.config.reward_code import CodeConfig
from darts_async.errors import ConfigError, DataError, SandboxError
from darts_async.reward import code
from darts_async.reward.code import Case, CodeReward, cases_of, program_in
from darts_async.reward.sandbox.choice import Choice
from darts_async.reward.sandbox.isolation import Isolation
from darts_async.reward.worker_messages import CodeSpec

DOUBLE = "```python\nprint(2 * int(input()))\n```"
ECHO = [{"input": "21", "output": "42"}, {"input": "1\n", "output": "2\n\n"}]


def reward_of(response: str, tests: Any, **settings: Any) -> float:
    reward = CodeReward(CodeSpec(**settings))
    return reward(prompt="", response=response, answer="", metadata={"tests": tests}, finish_reason="stop")


def test_settings_and_what_a_worker_gets_of_them_have_the_same_defaults() -> None:
    assert CodeConfig().model_dump() == msgspec.to_builtins(CodeSpec())


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\r\nx = 1\n```", "x = 1\n"),
        ("```Python3\nx = 1\ny = 2\n```", "x = 1\ny = 2\n"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 2\n"),
        ("<think>```python\nx = 1\n```</think> I cannot.", None),
        ("```python\nx = 1\n```\n</think>\n```python\nx = 2\n```", "x = 2\n"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("```python\nx = 1", None),
        ("```text\n42\n```\nIt works.\n```python\nx = 1\n```", "x = 1\n"),
        ("```text\n42\n```\nIt is done.\n```text\n42\n```", None),
        ("```python\nx = 1\n```\nIt prints\n```\n42\n```", "x = 1\n"),
        ("```\nx = 1\n```\nIt prints\n```text\n42\n```\nDone.", "x = 1\n"),
        ("```c++\nint x;\n```\n```python title=a.py\nx = 1\n```", "x = 1\n"),
        ("````markdown\n```python\nx = 1\n```\n````", None),
        ("```python\nx = 1\n``` That is all.", "x = 1\n"),
        ("x = 1", None),
    ],
)
def test_the_last_block_of_python_after_the_thoughts_is_the_program(response: str, program: str | None) -> None:
    assert program_in(response) == program


@pytest.mark.parametrize(
    ("tests", "cases"),
    [
        ([{"input": "1", "output": "2"}], [Case("1", "2")]),
        ({"inputs": ["1", ["2", "3"]], "outputs": ["2", ["4"]]}, [Case("1", "2"), Case("2\n3", "4")]),
        (["assert f(1) == 2"], [Case(statement="assert f(1) == 2")]),
        (json.dumps([{"input": "1", "output": "2", "type": "stdin"}]), [Case("1", "2")]),
    ],
)
def test_test_cases_have_the_forms_of_data_sets(tests: Any, cases: list[Case]) -> None:
    assert cases_of({"tests": tests}, "tests") == cases


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"others": 1}, "no field 'tests' with test cases .*; its fields are 'others'"),
        ({}, "its fields are none"),
        ({"tests": []}, "no test case in 'tests'"),
        ({"tests": "not json"}, "a text that is not JSON"),
        ({"tests": [{"input": "1"}]}, r"write \[\{input, output\}"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "write"),
        ({"tests": 3}, "write"),
        ({"tests": [{"input": 1, "output": 2}]}, "write"),
    ],
)
def test_a_record_without_test_cases_is_a_failure_and_no_reward(metadata: dict[str, Any], error: str) -> None:
    with pytest.raises(DataError, match=error):
        cases_of(metadata, "tests")


@pytest.mark.slow
def test_what_is_printed_is_compared_without_white_space_at_the_ends_of_lines() -> None:
    assert reward_of(DOUBLE, ECHO) == 1.0
    assert reward_of("```python\nprint(42, end='  ')\n```", [{"input": "", "output": "42"}]) == 1.0
    assert reward_of("```python\nprint(4, 2)\n```", [{"input": "", "output": "42"}]) == 0.0


@pytest.mark.slow
def test_statements_are_executed_after_the_program() -> None:
    program = "```python\ndef f(x):\n    return 2 * x\n```"
    assert reward_of(program, ["assert f(1) == 2", "assert f(2) == 4"]) == 1.0
    assert reward_of(program, ["assert f(1) == 2", "assert f(2) == 5"], score="share") == 0.5
    assert reward_of("```python\nimport sys; sys.exit(0)\n```", ["assert f(1) == 2"]) == 0.0
    assert reward_of("```python\nimport os; os._exit(0)\n```", ["assert f(1) == 2"]) == 0.0


@pytest.mark.slow
def test_a_response_without_a_program_earns_nothing() -> None:
    assert reward_of("I do not know.", ECHO) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", ["while True: pass", "1 / 0", "x = '", "print('y' * 10**7)", "import no_such_module"]
)
def test_a_program_that_fails_earns_nothing(program: str) -> None:
    assert reward_of(f"```python\n{program}\n```", ECHO, wall_s=1.0) == 0.0


@pytest.mark.slow
def test_test_cases_for_which_no_time_is_left_have_failed() -> None:
    slow = "```python\nn = input()\nif n != 'a':\n    while True: pass\nprint(n)\n```"
    tests = [{"input": name, "output": name} for name in "abc"]
    assert reward_of(slow, tests, wall_s=1.0, total_s=1.5, score="share") == pytest.approx(1 / 3)


def test_a_sandbox_that_does_not_work_is_a_failure_and_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    walls = Isolation("bubblewrap", sys.executable, "/nonexistent/bwrap")
    monkeypatch.setattr(code, "isolation_of", lambda spec: Choice(walls))
    with pytest.raises(SandboxError, match="cannot be started"):
        reward_of(DOUBLE, ECHO)


def test_a_machine_that_cannot_confine_programs_is_told_before_the_first_response(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    code.choose_isolation.cache_clear()
    with pytest.raises(ConfigError, match="bubblewrap is not installed"):
        CodeReward(CodeSpec(isolation="bubblewrap"))
    code.choose_isolation.cache_clear()
