"""Answers that the scorers of reasoning-gym would execute."""

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from darts_async.reward import task_guard
from darts_async.reward.task_families import score
from darts_async.reward.task_guard import MAX_CHARS, evaluates, is_harmless, refusal

pytest.importorskip("reasoning_gym")


def task_of(family: str) -> dict[str, Any]:
    from reasoning_gym.factory import create_dataset

    return dict(create_dataset(family, seed=1, size=1)[0])


def scored(family: str, task: dict[str, Any], response: str) -> float:
    metadata = {"family": family, "arguments": {}, "entry": {key: task[key] for key in ("answer", "metadata")}}
    answer = str(task["answer"])
    return score(prompt=task["question"], response=response, answer=answer, metadata=metadata, finish_reason="stop")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(task_guard.LITERALS | task_guard.EXPRESSIONS))
def test_an_answer_is_not_executed(family: str, tmp_path: Path) -> None:
    task, made = task_of(family), tmp_path / "made"
    code = f"__import__('pathlib').Path({str(made)!r}).touch()"
    for response in (code, f"<answer>[{code}]</answer>", f"<answer>1 + {code}</answer>"):
        assert scored(family, task, response) < 0.1
    assert not made.exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(task_guard.LITERALS | task_guard.EXPRESSIONS - {"countdown", "puzzle24"}))
def test_the_reference_answer_still_earns_everything(family: str) -> None:
    task = task_of(family)
    assert scored(family, task, f"<answer>{task['answer']}</answer>") == 1.0


@pytest.mark.slow
def test_a_list_in_place_of_text_still_earns_its_part() -> None:
    task = task_of("spiral_matrix")
    assert scored("spiral_matrix", task, f"<answer>{task['answer'].split()}</answer>") == 0.1


@pytest.mark.slow
def test_an_expression_for_a_number_still_earns_everything() -> None:
    task = task_of("countdown")
    assert scored("countdown", task, f"<answer>{task['metadata']['expression']}</answer>") == 1.0


@pytest.mark.slow
def test_every_family_that_evaluates_text_is_guarded_or_refused() -> None:
    from reasoning_gym.factory import DATASETS

    sources = {name: inspect.getsource(sys.modules[cls.__module__]) for name, (cls, _) in DATASETS.items()}
    evaluating = {name for name, source in sources.items() if evaluates(source)}
    assert evaluating == task_guard.KNOWN
    assert {name for name in DATASETS if refusal(name)} == task_guard.FORWARDING


@pytest.mark.slow
def test_a_family_that_is_not_known_and_evaluates_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_guard, "KNOWN", frozenset())
    with pytest.raises(ValueError, match="may execute what a response says, because its module calls parse_expr;"):
        task_guard.guard("countdown")


@pytest.mark.parametrize(
    "answer",
    [
        "(1 + 2) * 3 / -4",
        "2 ** 10",
        "(x**2 + 1)**(3/2)/3 + C",
        "E**(2*x)/2 + exp(x)*sin(x)",
        "log(x + 1) + Abs(x)",
        "0.5*x**2",
    ],
)
def test_arithmetic_is_harmless(answer: str) -> None:
    entry = {"answer": "x", "metadata": {"variable": "x"}}
    assert is_harmless("intermediate_integration", answer, entry)


@pytest.mark.parametrize(
    "answer",
    [
        "exit()",
        "x.__class__",
        "x.real",
        "sympify('1')",
        "exp(x, evaluate=x)",
        "exp(x, x, x)",
        "(lambda: x)()",
        "[x]",
        "x if x else x",
        "True",
        "9**9**9",
        "9**(9**99)",
        "9**100",
        "9**(99*99*99)",
        "(9**99)**99**1",
        "((9**99)**99)**99",
        "1" * 20,
        "1e999",
        "factorial(99)",
        "y",
        "1 +",
        "(" * 500,
        "x\n+1",
        "1 # x",
        "+".join("1" * MAX_CHARS),
    ],
)
def test_what_is_no_arithmetic_or_does_not_end_is_not_harmless(answer: str) -> None:
    assert not is_harmless("simple_integration", answer, {"answer": "x + C", "metadata": {"variable": "x"}})


@pytest.mark.parametrize("family", ["countdown", "puzzle24"])
def test_numbers_need_no_words(family: str) -> None:
    assert not is_harmless(family, "x", {"answer": "x"})
    assert not is_harmless(family, "sin(1)", {})
    assert is_harmless(family, "4 * (7 - 1)", {"answer": None})
