"""Learners of real processes: killed, started again, of one rank and of several."""

import asyncio
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from darts_async.config import RunConfig
from darts_async.errors import PERMANENT_EXIT_CODE
from darts_async.learner.checkpoints import checkpoint
from darts_async.learner.trainer_setup import make_trainer
from darts_async.models.location import resolve_model_path
from darts_async.protocol import LearnerReady, Shutdown
from tests.learner.run import GROUPS_PER_STEP, LearnerRun, groups_of, learner_run, settings
from tests.learner.world import load_groups

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


COMPARED = ("loss", "entropy", "reference_kl", "grad_norm", "reward_mean", "ratio_max", "ratio_p50", "tokens")
LORA = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]}


@dataclass
class Reference:
    """What one trainer in this process makes of the same groups."""

    metrics: list[dict[str, float]]
    """Of each step."""
    weights: list[dict[str, torch.Tensor]]
    """Of each version."""
    state: dict[str, torch.Tensor]
    """At the end."""


def reference_of(config: RunConfig) -> Reference:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(config.roles.learner.threads)  # how sums are split decides their last bit
    trainer = make_trainer(config, resolve_model_path(config.model.path), None)
    found = Reference([], [copies(trainer.rows())], {})
    for step in range(config.learner.steps):
        for group in groups_of(step):
            trainer.add_groups([group])
        found.metrics.append(trainer.finish_step())
        found.weights.append(copies(trainer.rows()))
    found.state = copies(trainer.state_tensors())
    torch.set_num_threads(num_threads)
    return found


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Four steps that nothing disturbed."""
    return reference_of(settings(1))


def last_checkpoint(run: LearnerRun) -> Path:
    return run.run_dir / "checkpoints" / "step-000004"


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0, msg=name)


def assert_same_course(found: LearnerRun, expected: Reference, num_steps: int) -> None:
    assert found.weights.keys() == set(range(num_steps + 1))
    for version, weights in found.weights.items():
        assert_close(weights, expected.weights[version], tolerance=1e-4)
    for step in range(num_steps):
        metrics = {name.removeprefix("learner/"): value for name, value in found.metrics[step].items()}
        assert metrics.keys() >= expected.metrics[step].keys()
        for name in set(COMPARED) & metrics.keys():
            assert metrics[name] == pytest.approx(expected.metrics[step][name], rel=1e-4, abs=1e-4), (step, name)


async def test_a_learner_that_was_killed_takes_the_same_steps_as_one_that_was_not(
    tmp_path: Path, reference: Reference
) -> None:
    async with learner_run(tmp_path, settings(1), max_step=2) as killed:
        await killed.start()
        await killed.until(lambda: killed.published[-1:] == [3] and 2 in killed.saved)
        await killed.kill("learner/0")
        killed.max_step = killed.early_step = 3
        await killed.start(incarnation=2)
        await killed.until(lambda: killed.ready == [0, 2])
        await killed.finish()
    assert killed.first_words == [LearnerReady, LearnerReady], (
        "of its checkpoint it tells after it has said where it is"
    )
    assert [step for step, _ in killed.committed] == [0, 1, 2, 2, 3]
    for step, group_ids in killed.committed:
        assert group_ids == [group.group_id for group in groups_of(step)], "none twice, none left out"
    assert killed.published == [0, 1, 2, 3, 3, 4], "nothing older than what a generator has"
    state = load_file(last_checkpoint(killed) / "trainer-00001-of-00001.safetensors")
    del state["random.cpu"]
    assert_close(state, reference.state, tolerance=0)
    assert checkpoint.read_manifest(last_checkpoint(killed)).consumed == ((0, 4 * GROUPS_PER_STEP),)
    assert (last_checkpoint(killed) / "shaper.state").read_bytes() == b"the shaper after step 3"
    assert_close(load_file(tmp_path / "model" / "model.safetensors"), killed.weights[4], tolerance=0)


async def test_a_learner_that_has_nothing_left_to_train_leaves_without_a_word_of_the_shaper(tmp_path: Path) -> None:
    async with learner_run(tmp_path, settings(1)) as run:
        await run.start()
        await run.finish()
    shutil.rmtree(tmp_path / "model")
    async with learner_run(tmp_path, settings(1), is_silent=True) as run:
        await run.start(incarnation=2)
        await run.until(lambda: run.ready == [4])
        run.links["launcher"].send("learner/0", Shutdown("all steps taken", finished=True))
        assert await run.exit_codes() == {"learner/0": 0}, run.errors()
    assert (tmp_path / "model" / "config.json").is_file()


async def test_two_ranks_train_and_publish_what_one_does(tmp_path: Path, reference: Reference) -> None:
    async with learner_run(tmp_path, settings(2)) as two:
        await two.start()
        await two.finish()
    assert_same_course(two, reference, num_steps=4)
    assert_close(load_file(tmp_path / "model" / "model.safetensors"), two.weights[4], tolerance=0)
    parts = {path.name for path in last_checkpoint(two).glob("trainer-*")}
    assert parts == {"trainer-00001-of-00002.safetensors", "trainer-00002-of-00002.safetensors"}


async def test_a_hung_rank_ends_the_learner_and_any_number_of_ranks_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """With adapters, and the model without them as the reference: what two ranks publish is merged there, too."""
    lora = {"lora": LORA, "loss": {"kl_weight": 0.1}}
    reference = reference_of(settings(1, **lora))
    async with learner_run(tmp_path, settings(2, **lora), max_step=1) as two:
        await two.start()
        await two.until(lambda: two.published[-1:] == [2] and 2 in two.saved)
        two.processes["learner/1"].send_signal(signal.SIGSTOP)
        two.send_groups(2)  # so that rank 0 waits inside a collective
        async with asyncio.timeout(30):  # transport.dead_after_s is 2, learner.rank_deadline_s 60
            assert await two.processes["learner/0"].wait() == 1
        gone = "learner/1, a rank of the learner, is gone (it was silent for 2.0 s)"
        assert f"learner/0: ProcessDiedError: {gone}" in two.errors()
    assert_same_course(two, reference, num_steps=2)
    assert two.metrics[1]["learner/reference_kl"] > 0
    async with learner_run(tmp_path, settings(1, **lora)) as one:
        await one.start(incarnation=2)
        await one.finish()
    assert one.ready == [2]
    assert one.published == [2, 3, 4]
    assert_close(one.weights[4], reference.weights[4], tolerance=1e-4)
    assert_close(load_file(tmp_path / "model" / "model.safetensors"), one.weights[4], tolerance=0)
    moved = {name for name, weight in one.weights[4].items() if not weight.equal(two.weights[0][name])}
    assert {name.split(".")[-2] for name in moved} == set(LORA["target_modules"])


OVERFLOWS = 3e38
"""A weight that float32 holds, and twice of which it does not."""


async def test_losses_that_are_not_finite_end_the_run_and_leave_their_batch_behind(tmp_path: Path) -> None:
    async with learner_run(tmp_path, settings(1, max_skipped_steps=2), poison=OVERFLOWS) as run:
        await run.start()
        assert await run.exit_codes() == {"learner/0": PERMANENT_EXIT_CODE}, "it would not be finite again"
        assert "not finite in 2 steps in a row (learner.max_skipped_steps), the last was step 1" in run.errors()
    assert run.published == [0, 1], "the step before was skipped, and its version published"
    assert run.metrics[0]["learner/skipped_steps"] == 1
    groups = load_groups(tmp_path / "nonfinite-step-000001.safetensors")
    for found, expected in zip(groups, groups_of(1, poison=OVERFLOWS), strict=True):
        assert all(str(getattr(found, name)) == str(getattr(expected, name)) for name in found.__struct_fields__), (
            found.group_id
        )
