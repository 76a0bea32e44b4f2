"""What a shaper that takes the place of another knows about the prompts."""

import msgspec

from darts_async.shaper.planner import Planner
from tests.shaper_world import world_config


def test_what_was_learnt_is_there_when_the_run_is_taken_up_again() -> None:
    config = world_config(shaping={"redundancy": {"total": "fixed", "split": "shuffled"}, "launch": 6})
    planner = Planner(config)
    planner.history.observe(3, [10, 20, 40], [15, 80], [0.0, 1.0, 1.0])
    planner.history.observe(4, [10, 200, 400], [150, 800], [0.0, 1.0, 1.0])
    planner.num_samples([3, 4, 5])
    learnt = msgspec.json.decode(msgspec.json.encode(planner.to_state()))
    restored, fresh = Planner(config, learnt), Planner(config)
    assert restored.history.length(3) == planner.history.length(3)
    assert restored.history.pass_rate(3) == planner.history.pass_rate(3)
    assert restored.to_state() == planner.to_state()
    prompts = list(range(40))
    after = planner.num_samples(prompts)
    assert restored.num_samples(prompts) == after, "the lots go on where they were"
    assert fresh.num_samples(prompts) != after
