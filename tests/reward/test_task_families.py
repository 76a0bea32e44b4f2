"""The scorers of reasoning-gym: the answer is found in the response, and its own family scores it."""

from typing import Any

import pytest

from darts_async.reward.task_families import answer_in, score

GCD: dict[str, Any] = {"family": "gcd", "arguments": {"max_value": 20}, "entry": {"answer": "4", "metadata": {}}}
PROMPT = "Find the Greatest Common Divisor (GCD) of these numbers: 4, 16."


def scored(response: str, metadata: dict[str, Any] = GCD, answer: str = "4", finish_reason: str = "stop") -> float:
    return score(prompt=PROMPT, response=response, answer=answer, metadata=metadata, finish_reason=finish_reason)


@pytest.mark.parametrize(
    ("response", "reference", "answer"),
    [
        ("<answer>3</answer> no, <answer> 4 </answer>", "4", "4"),
        (r"It is \boxed{4}, and not 5", "4", "4"),
        ("4 + 5 = 9. So it is 9.", "9", "9"),
        ("5 - 9 = -4", "-4", "-4"),
        ("in all 1,024, as said", "1024", "1,024"),
        ("It is 3/4.", "1/2", "3/4"),
        ("four", "4", "four"),
        (" Yes\n", "Yes", "Yes"),
        ("red 1, blue 2", "red", "red 1, blue 2"),
    ],
)
def test_the_answer_is_in_tags_or_in_a_box_or_the_last_number_or_everything(
    response: str, reference: str, answer: str
) -> None:
    assert answer_in(response, reference) == answer


@pytest.mark.slow
def test_the_family_scores_the_answer() -> None:
    assert scored("16 = 4 * 4, so it is 4.") == 1.0
    assert scored("It is 7.") == 0.0
    assert scored("4", finish_reason="length") == 0.0


@pytest.mark.slow
def test_a_task_without_a_reference_answer_is_scored_by_its_conditions() -> None:
    """Any colouring without two equal neighbours is right."""
    puzzle = {"vertices": [0, 1], "edges": [[0, 1]], "num_colors": 2, "color_options": [1, 2]}
    entry = {"answer": None, "metadata": {"possible_answer": {}, "puzzle": puzzle}}
    colours = {"family": "graph_color", "arguments": {}, "entry": entry}
    assert scored('{"0": 1, "1": 2}', colours, answer="") == 1.0
    assert scored('{"0": 1, "1": 1}', colours, answer="") < 0.5


def test_prompts_of_another_source_are_refused() -> None:
    with pytest.raises(ValueError, match="and no others"):
        scored("4", {"level": 3})
