"""Prompts are planned by the batch and asked one at a time."""

from collections.abc import Sequence

from darts_async.prompts.source import ShuffledPrompts
from darts_async.shaper.prompt_queue import MAX_PASSED_OVER, PromptQueue
from tests.shaper.world import prompts


def queue_of(batch: int) -> tuple[PromptQueue, list[list[int]]]:
    asked: list[list[int]] = []

    def split(prompt_ids: Sequence[int]) -> list[int]:
        asked.append(list(prompt_ids))
        return [10 + i for i in range(len(prompt_ids))]

    return PromptQueue(ShuffledPrompts(prompts(20), seed=1), split, batch), asked


def test_a_batch_is_split_once_and_asked_in_the_order_of_the_source() -> None:
    queue, batches = queue_of(3)
    source = ShuffledPrompts(prompts(20), seed=1)
    launches = [queue.next() for _ in range(7)]
    assert [launch.prompt.prompt_id for launch in launches] == [source.draw().prompt_id for _ in range(7)]
    assert [launch.num_samples for launch in launches] == [10, 11, 12, 10, 11, 12, 10]
    assert [len(batch) for batch in batches] == [3, 3, 3]


def test_the_cursor_counts_what_was_asked_and_not_what_was_drawn_ahead() -> None:
    queue, _ = queue_of(3)
    assert queue.cursor == 0
    cursors = []
    for _ in range(4):
        queue.next()
        cursors.append(queue.cursor)
    assert cursors == [1, 2, 3, 4]


def test_a_prompt_that_is_asked_again_comes_first_with_as_many_samples_as_before() -> None:
    queue, batches = queue_of(3)
    first = queue.next()
    queue.ask_again(first.prompt, 15)
    assert not queue.fresh().asked_again, "spares are new prompts"
    again = queue.next()
    assert (again.prompt, again.num_samples, again.asked_again) == (first.prompt, 15, True)
    assert len(batches) == 1
    assert queue.cursor == 2


def passing_over(batch: int, *, evens: bool = True) -> PromptQueue:
    """Passes over even ids, or all."""
    source, split = ShuffledPrompts(prompts(20), seed=1), lambda prompt_ids: [4] * len(prompt_ids)
    return PromptQueue(source, split, batch, lambda prompt_id, place: not evens or prompt_id % 2 == 0)


def test_what_a_curriculum_passes_over_is_not_asked_and_the_order_of_the_rest_stays() -> None:
    queue, source = passing_over(3), ShuffledPrompts(prompts(20), seed=1)
    in_order = [source.draw().prompt_id for _ in range(40)]
    asked = [queue.next().prompt.prompt_id for _ in range(18)]
    assert asked == [prompt_id for prompt_id in in_order if prompt_id % 2][:18]
    assert queue.num_passed_over == queue.cursor - 18


def test_a_queue_that_passes_prompts_over_continues_where_its_state_was_taken() -> None:
    for num_asked in range(12):
        through, resumed = passing_over(3), passing_over(3)
        for _ in range(num_asked):
            through.next()
        resumed.restore(through.to_state())
        assert resumed.cursor == through.cursor
        assert [resumed.next() for _ in range(9)] == [through.next() for _ in range(9)]
        assert resumed.num_passed_over == through.num_passed_over


def test_where_everything_is_passed_over_a_prompt_is_asked_all_the_same() -> None:
    queue = passing_over(1, evens=False)
    queue.next()
    assert (queue.num_passed_over, queue.cursor) == (MAX_PASSED_OVER, MAX_PASSED_OVER + 1)
