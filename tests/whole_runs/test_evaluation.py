"""Evaluations beside training in a live run of real processes, one of which dies meanwhile."""

from pathlib import Path
from typing import Any

import pytest

from darts_async.protocol import group_id_of
from darts_async.shaper.ledger import AnyRecord, GroupOpened, SampleEnded, read_ledger
from tests.support.launched import LaunchedRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STEPS, NUM_HELD_OUT, NUM_SAMPLES = 16, 24, 4
SECTIONS: dict[str, Any] = {
    "roles": {"generator": {"replicas": 2, "restart": {"backoff": {"initial_s": 0.1}}}},
    "shaping": {"rule": "survivor", "launch": 6, "keep": 4, "shortest": 3, "longest": 1},
    "prompts": {"held_out": NUM_HELD_OUT},
    "learner": {"steps": STEPS, "checkpoint_every": 4},
    # 4 of the 64 slots: one prompt after the other, so that an evaluation lasts for several steps
    "evaluation": {"every_steps": 3, "samples_per_prompt": NUM_SAMPLES, "max_slot_share": 0.06},
}


def places_of_evaluations(records: list[AnyRecord]) -> list[range]:
    """For each evaluation, from the record that opens its first group to the one that ends its last sample."""
    groups = [r.group_id for r in records if isinstance(r, GroupOpened) and r.purpose == "evaluate"]
    spans = []
    for start in range(0, len(groups), NUM_HELD_OUT):
        of = set(groups[start : start + NUM_HELD_OUT])
        places = [
            place
            for place, record in enumerate(records)
            if (isinstance(record, GroupOpened) and record.group_id in of)
            or (isinstance(record, SampleEnded) and group_id_of(record.sample_id) in of)
        ]
        spans.append(range(places[0], places[-1]))
    return spans


def test_steps_are_taken_while_the_held_out_prompts_are_evaluated_and_everything_adds_up(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", SECTIONS, "crash generator.step:400@generator/0") as run:
        assert run.end() == 0, run.output
        summary = run.assert_clean()
        assert [event["process"] for event in run.events("ended")] == ["generator/0"]

        lines = [line for line in run.lines("metrics.jsonl") if line["type"] == "evaluation"]
        versions = [line["policy_version"] for line in lines]
        assert versions == sorted(set(versions))
        assert {0, 3, STEPS} <= set(versions) <= {0, 3, 6, 9, 12, 15, STEPS}
        assert len(lines) + sum(line["num_skipped"] for line in lines) == 7
        for line in lines:
            assert len(line["rewards"]) == len(line["num_tokens"]) == NUM_HELD_OUT * NUM_SAMPLES
            assert 0 <= line["pass@1"] <= line["pass@2"] <= line["pass@4"] <= 1
        assert [evaluation["policy_version"] for evaluation in summary["evaluations"]] == versions
        assert f"held-out prompts at version {versions[1]}  reward" in run.output

        records = list(read_ledger(run.run_dir / "ledger.msgpack"))
        spans = places_of_evaluations(records)
        assert len(spans) == len(lines)
        trained = [{r.step for r in (records[i] for i in s) if isinstance(r, SampleEnded) and r.step} for s in spans]
        assert len(trained[1]) >= 2, "steps are committed while the first evaluation beside training is under way"
        assert (trained[0], trained[-1]) == (set(), set())

        assert "checkpoint_without_shaper" not in (run.run_dir / "logs" / "learner-0.jsonl").read_text()
        states = list((run.run_dir / "checkpoints").glob("*/shaper.state"))
        assert states
        assert all(path.stat().st_size for path in states)
