"""Prompts are planned by the batch and asked one at a time."""

from collections.abc import Sequence

from darts_async.prompts.source import ShuffledPrompts
from darts_async.shaper.prompt_queue import PromptQueue
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
