"""What a learner remembers, and how its work is laid out over steps and ranks: the pure parts."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed
from safetensors.torch import load_file

from darts_async.config import LearnerConfig
from darts_async.errors import CheckpointError, ConfigError
from darts_async.learner.checkpoints import checkpoint
from darts_async.learner.checkpoints.export import write_model
from darts_async.learner.intake import ConsumedGroups
from darts_async.learner.lr_schedule import learning_rate
from darts_async.learner.metric_sums import Tally
from darts_async.learner.nonfinite import save_groups
from darts_async.learner.ranks.rank_info import RankInfo, overlaps, rows_of
from tests.learner.world import load_groups, make_group, make_trainer, packed_model

# --- consumed groups -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40)))
def test_consumed_groups_are_a_set_in_the_fewest_intervals(group_ids: list[int]) -> None:
    consumed = ConsumedGroups()
    for group_id in group_ids:
        consumed.add(group_id)
    members = {group_id for start, stop in consumed.intervals for group_id in range(start, stop)}
    assert members == set(group_ids)
    assert [group_id for group_id in range(42) if group_id in consumed] == sorted(members)
    assert all(start < stop for start, stop in consumed.intervals)
    assert all(one[1] < other[0] for one, other in zip(consumed.intervals, consumed.intervals[1:], strict=False))
    assert ConsumedGroups(consumed.intervals).intervals == consumed.intervals


def test_a_long_run_without_gaps_is_remembered_in_one_interval() -> None:
    consumed = ConsumedGroups()
    for group_id in (*range(0, 1000, 2), *range(999, 0, -2)):
        consumed.add(group_id)
    assert consumed.intervals == ((0, 1000),)


# --- the rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", [0.5, 1, 1, 0.2 + 0.4 * (1 + math.cos(math.pi / 4)), 0.6, 0.2 + 0.4 * (1 - math.cos(math.pi / 4))]),
    ],
)
def test_the_rate_follows_its_schedule_from_the_end_of_the_warmup(schedule: str, shares: list[float]) -> None:
    settings = {"steps": 6, "warmup_steps": 2, "learning_rate": 2.0, "schedule": schedule, "final_rate_share": 0.2}
    config = LearnerConfig.model_validate(settings)
    assert [learning_rate(config, step) / 2 for step in range(6)] == pytest.approx(shares)
    assert learning_rate(config, 60) / 2 == pytest.approx(1 if schedule == "constant" else 0.2)


def test_a_schedule_that_has_no_steps_to_decay_over_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps \(5\).*learner.steps \(5\), but nothing lies between"):
        LearnerConfig(steps=5, warmup_steps=5, schedule="cosine")


# --- ranks ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 9))
def test_rows_are_those_of_torch_chunk(num_rows: int, num_ranks: int) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(num_rows).chunk(num_ranks)] if num_rows else []
    rows = [list(range(*rows_of(num_rows, rank, num_ranks))) for rank in range(num_ranks)]
    assert rows == chunks + [[]] * (num_ranks - len(chunks))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_every_rank_finds_its_rows_in_the_parts_of_any_number_of_ranks(num_rows: int, old: int, new: int) -> None:
    parts = [list(range(*rows_of(num_rows, rank, old))) for rank in range(old)]
    for rank in range(new):
        start, stop = rows_of(num_rows, rank, new)
        found = [row for k, first, last in overlaps(start, stop, num_rows, old) for row in parts[k][first:last]]
        assert found == list(range(start, stop))


@pytest.mark.parametrize(
    ("environment", "rank_info"),
    [({}, RankInfo(0, 1)), ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, RankInfo(2, 4))],
)
def test_rank_and_number_come_from_the_environment(environment: dict[str, str], rank_info: RankInfo) -> None:
    assert RankInfo.from_environment(environment) == rank_info


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"RANK": "x"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_a_rank_that_cannot_be_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"RANK is '.' and WORLD_SIZE '.'"):
        RankInfo.from_environment(environment)


def test_a_tally_crosses_the_link_between_ranks() -> None:
    tally = Tally()
    tally.mean("loss", torch.tensor([1.0, 2.0]))
    tally.maximum("ratio_max", torch.tensor([3.0]))
    tally.quantiles("ratio", torch.tensor([0.1, -0.2, 0.3]))
    assert Tally.of(tally.message(0)).as_floats() == tally.as_floats()


def test_a_checkpoint_of_two_ranks_is_read_by_one_and_by_three(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.add_groups([make_group([3, 5, 2], rewards=[1, 0, 0.5])])
    trainer.finish_step()
    whole = checkpoint.Snapshot.of(trainer)
    staging = checkpoint.open_checkpoint(tmp_path, 1)
    tensors = [cut(whole.tensors, rank, 2) for rank in range(2)]
    snapshots = [replace(whole, rank_info=RankInfo(rank, 2), tensors=tensors[rank]) for rank in range(2)]
    parts = [checkpoint.write_part(staging, snapshot) for snapshot in snapshots]
    write_model(staging, trainer.model, whole.weights, torch.float32, tmp_path)
    path = checkpoint.complete(staging, snapshots[0], parts, consumed=(), shaper_state=b"", keep=1)
    resumed = make_trainer(packed_model(seed=5))
    manifest = checkpoint.restore(path, resumed)
    for name, tensor in resumed.state_tensors().items():
        assert tensor.equal(whole.tensors[name]), name
    for rank in range(3):
        found = checkpoint.read_state(path, manifest, RankInfo(rank, 3))
        expected = cut(whole.tensors, rank, 3)
        assert found.keys() == {name for name in expected if name != "random.cpu"}
        assert all(tensor.equal(expected[name]) for name, tensor in found.items())


def cut(tensors: dict[str, torch.Tensor], rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    """What a rank holds of a trainer's state."""
    whole = ("counts", "random.cpu")
    return {
        name: tensor if name in whole else tensor[slice(*rows_of(len(tensor), rank, num_ranks))].clone()
        for name, tensor in tensors.items()
    }


def test_a_missing_part_makes_a_checkpoint_torn(tmp_path: Path) -> None:
    trainer = make_trainer()
    whole = checkpoint.Snapshot.of(trainer)
    staging = checkpoint.open_checkpoint(tmp_path, 0)
    snapshots = [replace(whole, rank_info=RankInfo(rank, 2)) for rank in range(2)]
    parts = [checkpoint.write_part(staging, snapshot) for snapshot in snapshots]
    path = checkpoint.complete(staging, snapshots[0], parts, consumed=(), shaper_state=b"", keep=1)
    (path / "trainer-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"trainer-00002-of-00002.safetensors should have \d+ bytes and has none"):
        checkpoint.latest(tmp_path, 1)


def test_weights_are_exported_in_the_type_of_the_run_and_say_so(tmp_path: Path) -> None:
    trainer = make_trainer()
    staging = checkpoint.open_checkpoint(tmp_path, 0)
    write_model(staging, trainer.model, checkpoint.Snapshot.of(trainer).weights, torch.bfloat16, tmp_path)
    assert '"dtype": "bfloat16"' in (staging / "config.json").read_text()
    assert {tensor.dtype for tensor in load_file(staging / "model.safetensors").values()} == {torch.bfloat16}


# --- batches that broke training -----------------------------------------------------------------------------


def test_a_saved_batch_can_be_trained_again(tmp_path: Path) -> None:
    groups = [make_group([3, 2], group_id=11), changed(make_group([4], group_id=3), baseline=0.25)]
    save_groups(tmp_path / "batch.safetensors", groups)
    found = load_groups(tmp_path / "batch.safetensors")
    assert [(group.group_id, group.baseline) for group in found] == [(3, 0.25), (11, None)]
    for group, expected in zip(found, reversed(groups), strict=True):
        for name in expected.__struct_fields__:
            np.testing.assert_array_equal(getattr(group, name), getattr(expected, name))
    assert make_trainer().add_groups([found[1]])["entropy"] > 0


def test_a_loss_that_is_not_finite_skips_the_step_even_if_the_gradient_is() -> None:
    trainer = make_trainer()
    before = {name: tensor.clone() for name, tensor in trainer.rows().items()}
    trainer.add_groups([make_group([3, 4], rewards=[1, 0])])
    trainer.tally.add("loss", math.inf, 1)
    assert math.isnan(trainer.finish_step()["grad_norm"])
    assert trainer.num_skipped_in_a_row == 1
    assert all(tensor.equal(before[name]) for name, tensor in trainer.rows().items())
