"""Reference answers that no response, or no number, can equal are told before a run starts."""

import json
from pathlib import Path

import pytest

from darts_async.config import RunConfig
from darts_async.prompts.load import PromptSets, load_prompts
from launcher.preflight.preflight import check_run
from launcher.preflight.prompt_check import check_answers, check_test_cases
from launcher.problems import Problem

ANSWERS = ["5", "36 dollars", "no solution", r"\frac{1}{2}", "2 hours and 5 minutes", "B", "five"]


def problems(directory: Path, *answers: str, function: str = "math") -> tuple[RunConfig, list[Problem]]:
    path = directory / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "answer": each}) + "\n" for n, each in enumerate(answers)))
    prompts = {"source": "jsonl", "path": str(path), "held_out": 1, "chat_template": False}
    config = RunConfig.model_validate({"prompts": prompts, "reward": {"function": function}})
    sets: PromptSets = load_prompts(config)
    return config, list(check_answers(config, sets))


def test_answers_in_words_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    _, (hint,) = problems(tmp_path, *ANSWERS)
    assert hint.is_hint
    assert hint.message.startswith("2 of 7 reference answers are in words, which no number or expression can equal")
    assert "the first is " in hint.message
    assert any(f"{answer!r}, to the prompt 'p{place}'" in hint.message for place, answer in enumerate(ANSWERS))


def test_an_empty_answer_is_an_error(tmp_path: Path) -> None:
    _, (problem,) = problems(tmp_path, "5", r"\boxed{}", "$$", " ", "0")
    assert not problem.is_hint
    assert problem.message.startswith("3 of 5 reference answers are empty, and no response can equal them")


def test_expressions_and_the_answers_of_other_functions_are_not_told_of(tmp_path: Path) -> None:
    assert problems(tmp_path, "5", "x+1", "A", r"\text{(B)}", "12 apples")[1] == []
    assert problems(tmp_path, *ANSWERS, "", function="exact_match")[1] == []


def test_only_the_prompts_that_math_scores_are_looked_at(tmp_path: Path) -> None:
    def part(name: str, *answers: str, **settings: str) -> dict[str, object]:
        path = tmp_path / f"{name}.jsonl"
        rows = ({"prompt": f"{name} {n}", "answer": each} for n, each in enumerate(answers))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"name": name, "source": "jsonl", "path": str(path), "held_out": 1} | settings

    def messages(function: str, *mixture: dict[str, object]) -> list[str]:
        prompts = {"mixture": list(mixture), "chat_template": False}
        config = RunConfig.model_validate({"prompts": prompts, "reward": {"function": function}})
        return [problem.message for problem in check_answers(config, load_prompts(config))]

    assert messages("math", part("a", "5", "6"), part("b", "", "", reward="exact_match")) == []
    (message,) = messages("exact_match", part("a", "", "", ""), part("b", "", "6", reward="math"))
    assert message.startswith("1 of 2 reference answers are empty")


@pytest.mark.slow
def test_a_check_of_a_run_tells_of_them(tmp_path: Path) -> None:
    config, _ = problems(tmp_path, *ANSWERS)
    assert "prompts.answer_field" in [hint.place for hint in check_run(config).hints]
    config, _ = problems(tmp_path, *ANSWERS, "")
    assert any("are empty" in problem.message for problem in check_run(config).problems)


def test_records_without_test_cases_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    cases = [[{"input": "1", "output": "2"}], [], [{"input": "2", "output": "4"}]]
    path.write_text(
        "".join(json.dumps({"prompt": f"p{n}", "answer": "", "tests": c}) + "\n" for n, c in enumerate(cases))
    )
    prompts = {"source": "jsonl", "path": str(path), "held_out": 1, "chat_template": False}
    reward = {"functions": [{"code": {}}, {"function": "math"}]}
    config = RunConfig.model_validate({"prompts": prompts, "reward": reward})
    [problem] = check_test_cases(config, load_prompts(config))
    assert problem.message == (
        "1 of 3 records have no test cases that can be run; of the prompt 'p1': the record has no test case in 'tests'"
    )
    assert [*check_test_cases(RunConfig.model_validate({"prompts": prompts}), load_prompts(config))] == []
