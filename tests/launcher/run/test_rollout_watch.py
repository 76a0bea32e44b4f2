"""Two samples of the newest step, for the live view."""

import gzip
from pathlib import Path

import msgspec

from darts_async.rollouts import Rollout
from launcher.run.rollout_watch import newest_two


def write(directory: Path, step: int, rewards: list[float]) -> None:
    directory.mkdir(exist_ok=True)
    rollouts = [
        Rollout(
            kind="train",
            step=step,
            sample=f"{step}/{index}",
            group_id=step,
            sample_index=index,
            prompt_id=0,
            prompt="",
            outcome="trained",
            reward=reward,
        )
        for index, reward in enumerate(rewards)
    ]
    lines = b"".join(msgspec.json.encode(rollout) + b"\n" for rollout in rollouts)
    (directory / f"train-{step:06}.jsonl.gz").write_bytes(gzip.compress(lines))


def test_two_samples_of_the_newest_step_are_found_once(tmp_path: Path) -> None:
    assert newest_two(tmp_path / "samples", -1) is None
    write(tmp_path, 3, [0.0, 1.0, 0.5])
    found = newest_two(tmp_path, -1)
    assert found is not None
    assert (found[0], {rollout.reward for rollout in found[1]}) == (3, {0.0, 1.0})
    assert newest_two(tmp_path, 3) is None


def test_a_damaged_file_does_not_hide_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 3, [0.0, 1.0])
    (tmp_path / "train-000004.jsonl.gz").write_bytes(b"\x1f\x8bnot a file of gzip")
    found = newest_two(tmp_path, -1)
    assert found is not None
    assert found[0] == 3
