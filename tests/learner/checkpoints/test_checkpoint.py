import json
import re
from pathlib import Path

import pytest
import structlog
import torch
from transformers import AutoModelForCausalLM

from darts_async.errors import CheckpointError
from darts_async.learner.checkpoints import checkpoint
from darts_async.learner.checkpoints.export import write_model
from darts_async.learner.model import load_model, use_packed_attention
from darts_async.learner.step import Trainer
from darts_async.models.length_limits import Lengths
from darts_async.wire.atomic_dir import remove_leftovers
from tests.learner.world import make_group, make_trainer, packed_model, plain_model

PART = "trainer-00001-of-00001.safetensors"


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """A directory as a model's is: tokenizer files beside weights that must not be copied."""
    path = tmp_path / "source"
    path.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json", "model.safetensors"):
        (path / name).write_text(name)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def take_step(trainer: Trainer) -> dict[str, float]:
    for place in range(2):
        group_id = 2 * trainer.policy_version + place
        trainer.add_groups([make_group([3, 5, 2], group_id=group_id, step=trainer.policy_version, rewards=[1, 0, 0.5])])
    return trainer.finish_step()


def save(
    trainer: Trainer,
    root: Path,
    tokenizer_dir: Path,
    *,
    keep: int = 2,
    consumed: tuple[tuple[int, int], ...] = (),
    shaper_state: bytes = b"",
) -> Path:
    staging = checkpoint.open_checkpoint(root, trainer.policy_version)
    snapshot = checkpoint.Snapshot.of(trainer)
    part = checkpoint.write_part(staging, snapshot)
    write_model(staging, trainer.model, snapshot.weights, trainer.model.dtype, tokenizer_dir)
    return checkpoint.complete(staging, snapshot, [part], consumed=consumed, shaper_state=shaper_state, keep=keep)


def assert_same_state(one: Trainer, other: Trainer) -> None:
    assert one.policy_version == other.policy_version
    assert_same_tensors(one.state_tensors(), other.state_tensors())


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_resumed_steps_equal_uninterrupted_ones_bitwise(
    root: Path, tokenizer_dir: Path, dtype: torch.dtype, num_steps: int
) -> None:
    original = make_trainer(packed_model(dtype=dtype), warmup_steps=5, weight_decay=0.1)
    for _ in range(num_steps):
        take_step(original)
    path = save(original, root, tokenizer_dir)
    resumed = make_trainer(packed_model(seed=9, dtype=dtype), warmup_steps=5, weight_decay=0.1)
    checkpoint.restore(path, resumed)
    assert_same_state(resumed, original)
    for _ in range(2):
        found, expected = take_step(resumed), take_step(original)
        for metrics in (found, expected):
            del metrics["tokens_per_second"], metrics["tflops_per_second"]
        assert found == expected
        assert_same_state(resumed, original)


def test_random_states_continue_where_they_were(root: Path, tokenizer_dir: Path) -> None:
    trainer = make_trainer()
    path = save(trainer, root, tokenizer_dir)
    expected = torch.rand(5)
    torch.manual_seed(123)
    checkpoint.restore(path, trainer)
    assert torch.rand(5).equal(expected)


def test_consumed_groups_and_the_shapers_state_come_back(root: Path, tokenizer_dir: Path) -> None:
    trainer = make_trainer()
    path = save(trainer, root, tokenizer_dir, consumed=((0, 3), (5, 6)), shaper_state=b"what it knew")
    assert path.name == "step-000000"
    assert checkpoint.restore(path, trainer).consumed == ((0, 3), (5, 6))
    assert (path / "shaper.state").read_bytes() == b"what it knew"


def test_a_snapshot_is_not_changed_by_the_steps_that_follow(root: Path, tokenizer_dir: Path) -> None:
    trainer = make_trainer()
    take_step(trainer)
    staging = checkpoint.open_checkpoint(root, 1)
    snapshot = checkpoint.Snapshot.of(trainer)
    expected = {name: tensor.clone() for name, tensor in trainer.state_tensors().items()}
    take_step(trainer)
    part = checkpoint.write_part(staging, snapshot)
    write_model(staging, trainer.model, snapshot.weights, torch.float32, tokenizer_dir)
    path = checkpoint.complete(staging, snapshot, [part], consumed=(), shaper_state=b"", keep=1)
    resumed = make_trainer()
    checkpoint.restore(path, resumed)
    assert resumed.policy_version == 1
    assert_same_tensors(resumed.state_tensors(), expected)


def test_a_checkpoint_is_a_hugging_face_model(root: Path, tokenizer_dir: Path) -> None:
    trainer = make_trainer()
    take_step(trainer)
    path = save(trainer, root, tokenizer_dir)
    assert (path / "vocab.txt").read_text() == "vocab.txt"
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert plain.config._attn_implementation == "sdpa"
    loaded = load_model(str(path), lengths=Lengths(64, 256), dtype="float32")
    for model in (plain, loaded):
        for weight, expected in zip(model.parameters(), trainer.model.parameters(), strict=True):
            assert weight.equal(expected)


def test_an_export_holds_model_and_tokenizer_and_replaces_an_older_one(tmp_path: Path, tokenizer_dir: Path) -> None:
    out_dir = tmp_path / "final"
    for seed in (0, 1):
        checkpoint.export(save(make_trainer(packed_model(seed)), tmp_path / "all", tokenizer_dir), out_dir)
    names = {file.name for file in out_dir.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "vocab.txt",
        "tokenizer_config.json",
    }
    tokens = torch.tensor([[1, 2, 3]])
    found = AutoModelForCausalLM.from_pretrained(out_dir).eval()(tokens).logits
    assert found.equal(plain_model(seed=1)(tokens).logits)
    assert {path.name for path in tmp_path.iterdir()} == {"all", "final", "source"}


def test_the_newest_checkpoints_are_kept(root: Path, tokenizer_dir: Path) -> None:
    trainer = make_trainer()
    for _ in range(4):
        save(trainer, root, tokenizer_dir, keep=2)
        take_step(trainer)
    assert sorted(path.name for path in root.iterdir()) == ["step-000002", "step-000003"]
    assert checkpoint.latest(root, 2) == root / "step-000003"


def test_a_checkpoint_of_the_same_step_is_replaced(root: Path, tokenizer_dir: Path) -> None:
    save(make_trainer(packed_model(seed=1)), root, tokenizer_dir)
    newer = make_trainer(packed_model(seed=2))
    path = save(newer, root, tokenizer_dir)
    resumed = make_trainer()
    checkpoint.restore(path, resumed)
    assert_same_state(resumed, newer)
    assert [path.name for path in root.iterdir()] == ["step-000000"]


def test_there_is_no_latest_before_the_first(root: Path) -> None:
    assert checkpoint.latest(root, 2) is None
    root.mkdir()
    assert checkpoint.latest(root, 2) is None


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "short file", "missing file"])
def test_a_torn_checkpoint_is_passed_over_and_refused(root: Path, tokenizer_dir: Path, damage: str) -> None:
    trainer = make_trainer()
    whole = save(trainer, root, tokenizer_dir)
    take_step(trainer)
    torn = save(trainer, root, tokenizer_dir)
    manifest, state = torn / "manifest.json", torn / PART
    match damage:
        case "no manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_bytes(manifest.read_bytes()[:20])
        case "short file":
            state.write_bytes(state.read_bytes()[:-1])
        case "missing file":
            state.unlink()
    with structlog.testing.capture_logs() as logs:
        assert checkpoint.latest(root, 2) == whole
    assert [(entry["event"], "step-000001" in entry["error"]) for entry in logs] == [("checkpoint_passed_over", True)]
    with pytest.raises(CheckpointError, match=r"step-000001 is (torn|not a complete checkpoint)"):
        checkpoint.restore(torn, trainer)


@pytest.mark.parametrize("name", [PART, "model.safetensors", "shaper.state"])
def test_a_single_flipped_bit_has_the_checkpoint_before_be_used(root: Path, tokenizer_dir: Path, name: str) -> None:
    trainer = make_trainer()
    whole = save(trainer, root, tokenizer_dir)
    take_step(trainer)
    damaged = save(trainer, root, tokenizer_dir, shaper_state=b"what it knew") / name
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with structlog.testing.capture_logs() as logs:
        assert checkpoint.latest(root, 2) == whole
    (entry,) = logs
    assert re.search(rf"step-000001 is damaged: the CRC-32 of {name} is [0-9a-f]{{8}}, but", entry["error"])


def test_a_crash_while_writing_leaves_the_old_checkpoint_and_no_half_of_a_new_one(
    root: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    whole = save(trainer, root, tokenizer_dir)
    take_step(trainer)

    def crash(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", crash)
        with pytest.raises(OSError, match="disk full"):
            save(trainer, root, tokenizer_dir)
    assert checkpoint.latest(root, 2) == whole
    assert checkpoint.latest(root, 2) != save(trainer, root, tokenizer_dir)
    assert sorted(path.name for path in root.iterdir()) == ["step-000000", "step-000001"]


@pytest.mark.parametrize("keep", [1, 2])
def test_only_torn_checkpoints_are_an_error_and_not_a_fresh_start(root: Path, tokenizer_dir: Path, keep: int) -> None:
    trainer = make_trainer()
    for _ in range(keep):
        (save(trainer, root, tokenizer_dir, keep=keep) / "manifest.json").unlink()
        take_step(trainer)
    before = sorted(root.iterdir())
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is complete; remove them to start over"):
        checkpoint.latest(root, keep)
    assert sorted(root.iterdir()) == before, "nothing is changed that may still be of use"


def test_before_there_are_enough_checkpoints_the_first_model_is_one(root: Path, tokenizer_dir: Path) -> None:
    trainer = make_trainer()
    take_step(trainer)
    (save(trainer, root, tokenizer_dir) / "manifest.json").unlink()
    assert checkpoint.oldest_kept(root, 2) == 0
    assert checkpoint.latest(root, 2) is None
    assert [path.name for path in root.iterdir()] == ["step-000001.damaged"]
    save(trainer, root, tokenizer_dir)
    assert [path.name for path in root.iterdir()] == ["step-000001"]
    take_step(trainer)
    save(trainer, root, tokenizer_dir)
    assert checkpoint.oldest_kept(root, 2) == 1


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(root: Path, tokenizer_dir: Path) -> None:
    trainer = make_trainer()
    paths = []
    for _ in range(2):
        take_step(trainer)
        paths.append(save(trainer, root, tokenizer_dir))
    (paths[1] / PART).unlink()
    assert checkpoint.latest(root, 2) == paths[0]
    assert sorted(path.name for path in root.iterdir()) == ["step-000001", "step-000002.damaged"]
    assert checkpoint.oldest_kept(root, 2) == 1, "the first model was given up when there were two"
    take_step(trainer)
    save(trainer, root, tokenizer_dir)
    assert sorted(path.name for path in root.iterdir()) == ["step-000001", "step-000003"]
    assert checkpoint.oldest_kept(root, 2) == 1


def test_any_flipped_bit_of_a_manifest_is_found(root: Path, tokenizer_dir: Path) -> None:
    path = save(make_trainer(), root, tokenizer_dir, consumed=((0, 3), (5, 16)))
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        manifest.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            checkpoint.read_manifest(path)
    manifest.write_bytes(content)
    assert checkpoint.read_manifest(path).consumed == ((0, 3), (5, 16))


def test_a_missing_checkpoint_is_named(root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-000007 is not a complete checkpoint"):
        checkpoint.restore(root / "step-000007", make_trainer())


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(root: Path, tokenizer_dir: Path) -> None:
    path = save(make_trainer(), root, tokenizer_dir)
    config = plain_model().config
    config.intermediate_size = 40
    model = AutoModelForCausalLM.from_config(config).eval()
    use_packed_attention(model)
    other = make_trainer(model)
    before = {name: tensor.clone() for name, tensor in other.state_tensors().items()}
    with pytest.raises(CheckpointError, match=r"of another model: .*\(24, 48\) there and \(24, 40\)"):
        checkpoint.restore(path, other)
    assert all(tensor.equal(before[name]) for name, tensor in other.state_tensors().items())


def test_a_checkpoint_of_another_format_is_refused(root: Path, tokenizer_dir: Path) -> None:
    trainer = make_trainer()
    path = save(trainer, root, tokenizer_dir)
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, but this version reads format 4"):
        checkpoint.restore(path, trainer)


def test_a_damaged_tensor_file_is_named(root: Path, tokenizer_dir: Path) -> None:
    trainer = make_trainer()
    path = save(trainer, root, tokenizer_dir)
    state = path / PART
    state.write_bytes(b"\xff" * state.stat().st_size)  # after `latest` has read it
    with pytest.raises(CheckpointError, match=r"trainer-00001-of-00001\.safetensors cannot be read"):
        checkpoint.restore(path, trainer)


def test_what_a_crash_has_left_is_removed_and_checkpoints_are_not(root: Path) -> None:
    names = [".writing-step-000005", ".removing-step-000001", "step-000002", "step-000003.damaged"]
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "model.safetensors").write_bytes(b"large")
    remove_leftovers(root)
    assert sorted(path.name for path in root.iterdir()) == names[2:]
