"""Adapters: what is trained, what is published, what is saved."""

import sys
from pathlib import Path
from typing import cast

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from darts_async.config import LoraConfig, RunConfig
from darts_async.errors import CheckpointError, ConfigError, ModelError
from darts_async.learner.checkpoints import checkpoint
from darts_async.learner.checkpoints.export import write_model
from darts_async.learner.flops import ModelFlops
from darts_async.learner.lora import MergedWeights, adapters_off, add_adapters
from darts_async.learner.model import load_model, use_packed_attention
from darts_async.learner.packing.tree import Tree
from darts_async.learner.ranks.rank_info import RankInfo, rows_of
from darts_async.learner.step import Trainer
from darts_async.learner.trainer_setup import make_trainer as trainer_of
from darts_async.models.length_limits import Lengths
from darts_async.models.location import resolve_model_path
from darts_async.protocol import TrainGroup
from launcher.preflight.preflight import check_adapters
from tests.learner.test_model import pack
from tests.learner.world import (
    VOCABULARY,
    gradients,
    make_group,
    make_trainer,
    packed_model,
    plain_logprobs,
    plain_model,
    response_logprobs,
)

LORA = LoraConfig(rank=4, alpha=8)
NUM_ADAPTED = 14  # 7 linear layers in each of 2


def adapted_model(seed: int = 0, dtype: torch.dtype = torch.float32, config: LoraConfig = LORA) -> PreTrainedModel:
    model = packed_model(dtype=dtype)
    add_adapters(model, config, seed)
    return model


def adapted_trainer(model: PreTrainedModel | None = None, **settings: object) -> Trainer:
    return make_trainer(model or adapted_model(), learning_rate=1e-2, **settings)


def take_step(trainer: Trainer) -> dict[str, float]:
    trainer.add_groups([make_group([3, 5, 2], step=trainer.policy_version, rewards=[1, 0, 0.5])])
    return trainer.finish_step()


def trained(num_steps: int = 3, **settings: object) -> Trainer:
    trainer = adapted_trainer(**settings)
    for _ in range(num_steps):
        take_step(trainer)
    return trainer


def save(trainer: Trainer, root: Path) -> Path:
    staging = checkpoint.open_checkpoint(root, trainer.policy_version)
    snapshot = checkpoint.Snapshot.of(trainer)
    part = checkpoint.write_part(staging, snapshot)
    write_model(staging, trainer.model, snapshot.weights, trainer.model.dtype, root)
    return checkpoint.complete(staging, snapshot, [part], consumed=(), shaper_state=b"", keep=2)


def merged_by_peft(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    merged = {name.replace(".base_layer.", "."): weight.clone() for name, weight in model.named_parameters()}
    return {name: weight for name, weight in merged.items() if ".lora_" not in name}


def run_config(**learner: object) -> RunConfig:
    return RunConfig.model_validate({"learner": {"lora": {"rank": 8, "alpha": 16}, "learning_rate": 2e-2, **learner}})


# --- what is trained -----------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing() -> None:
    group = make_group([3, 7, 1])
    (batch,) = pack(group)
    found, _ = response_logprobs(adapted_model(), batch, 1.0)
    assert found.equal(response_logprobs(packed_model(), batch, 1.0)[0])


def test_only_adapters_have_gradients_and_only_they_change() -> None:
    trainer = adapted_trainer()
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    take_step(trainer)  # in the first one A has a gradient of zero, because B is zero
    trainer.add_groups([make_group([3, 5, 2], step=1, rewards=[1, 0, 0.5])])
    moved = {name for name, gradient in gradients(trainer).items() if gradient.any()}
    assert len(moved) == 2 * NUM_ADAPTED
    assert all(".lora_A." in name or ".lora_B." in name for name in moved)
    trainer.finish_step()
    for name, weight in trainer.model.named_parameters():
        assert weight.equal(before[name]) != (name in moved), name
    assert trainer.shapes().keys() == moved


def test_named_layers_alone_get_adapters() -> None:
    model = adapted_model(config=LoraConfig(rank=2, target_modules=("q_proj", "mlp.up_proj")))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    expected = {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")}
    assert adapted == expected


def test_activations_can_be_checkpointed_with_adapters() -> None:
    found, expected = (adapted_trainer(activation_checkpointing=on) for on in (True, False))
    for trainer in (found, expected):
        take_step(trainer)
        trainer.add_groups([make_group([3, 5, 2], step=1, rewards=[1, 0, 0.5])])
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(found)[name], gradient, atol=1e-6, rtol=1e-5)


def test_a_frozen_weight_costs_one_product_less() -> None:
    whole, adapted = ModelFlops.of(packed_model()), ModelFlops.of(adapted_model())
    assert whole is not None
    assert adapted is not None
    lora = adapted.per_token - whole.per_token
    rank, hidden, inner = 4, 24, 48
    heads, kv_heads = 3 * 8, 8
    edges = 2 * (hidden + heads) + 2 * (hidden + kv_heads) + 3 * (hidden + inner)  # q, o; k, v; mlp
    assert lora == 2 * 2 * rank * edges
    num_tokens, num_targets = 7, 3
    frozen = whole.per_token * num_tokens + whole.per_target * num_targets
    difference = adapted.training([Tree(num_tokens)], num_targets) - whole.training([Tree(num_tokens)], num_targets)
    assert difference == 3 * lora * num_tokens - frozen


# --- what is published ---------------------------------------------------------------------------------------


def test_what_is_published_is_what_peft_merges_under_the_names_of_the_base_model() -> None:
    trainer = trained()
    source = trainer.source()
    assert [spec.name for spec in source.specs] == [name for name, _ in plain_model().named_parameters()]
    published = {spec.name: tensor for spec, tensor in zip(source.specs, source.tensors(), strict=True)}
    base = dict(plain_model().named_parameters())
    assert sum(not base[name].equal(tensor) for name, tensor in published.items()) == NUM_ADAPTED
    assert all(published[spec.name].shape == spec.shape for spec in source.specs)
    for name, expected in merged_by_peft(trainer.model).items():
        torch.testing.assert_close(published[name], expected, atol=1e-6, rtol=0)


def test_layers_that_store_their_weight_the_other_way_are_merged_too() -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 16, "n_embd": 24, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    use_packed_attention(model)
    add_adapters(model, LORA, 0)
    trainer = adapted_trainer(model)
    for _ in range(2):
        take_step(trainer)
    published = dict(trainer.rows())
    for name, expected in merged_by_peft(model).items():
        torch.testing.assert_close(published[name], expected, atol=1e-6, rtol=0)


def test_a_generator_with_the_published_weights_says_what_the_learner_says() -> None:
    trainer, group = trained(), make_group([3, 7, 1], seed=3)
    generator = plain_model(seed=5)
    generator.load_state_dict(dict(trainer.rows()), strict=False)
    (batch,) = pack(group)
    with torch.no_grad():
        found, _ = response_logprobs(trainer.model, batch, 1.0)
        responses = np.split(group.token_ids, np.cumsum(group.num_tokens)[:-1])
        expected = [plain_logprobs(generator, group.prompt_tokens, response) for response in responses]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)


def test_a_published_version_is_not_changed_by_the_next_step() -> None:
    trainer = trained(2)
    rows = trainer.rows()
    before = {name: row.clone() for name, row in rows.items()}
    take_step(trainer)
    assert all(rows[name].equal(row) for name, row in before.items())
    assert any(not trainer.rows()[name].equal(row) for name, row in before.items())


def test_merged_weights_are_made_one_at_a_time() -> None:
    trainer = trained()
    rows = trainer.rows()
    one, again = (rows["model.layers.0.mlp.up_proj.weight"] for _ in range(2))
    assert one.equal(again)
    assert one.data_ptr() != again.data_ptr()
    assert rows["model.norm.weight"].data_ptr() == trainer.model.get_parameter("model.norm.weight").data_ptr()


def test_the_rows_of_all_ranks_are_the_merged_weights() -> None:
    whole = cast(MergedWeights, trained().rows())
    for name, expected in whole.items():
        rows = []
        for rank in range(5):
            frozen = {each: w[slice(*rows_of(len(w), rank, 5))] for each, w in whole._frozen.items()}
            rows.append(MergedWeights(frozen, whole._factors, RankInfo(rank, 5))[name])
        torch.testing.assert_close(torch.cat(rows), expected, atol=1e-6, rtol=0)


def test_adapters_of_a_16_bit_model_are_trained_and_merged_in_32_bits() -> None:
    trainer = adapted_trainer(adapted_model(dtype=torch.bfloat16))
    for _ in range(2):
        take_step(trainer)
    state = trainer.state_tensors()
    assert {tensor.dtype for name, tensor in state.items() if name.startswith("weight.")} == {torch.float32}
    assert {row.dtype for row in trainer.rows().values()} == {torch.bfloat16}
    layer = trainer.model.get_submodule("model.layers.1.mlp.down_proj")
    b, a = (factor["default"].weight.float() for factor in (layer.lora_B, layer.lora_A))
    exact = layer.base_layer.weight.float() + 2 * b @ a
    assert trainer.rows()["model.layers.1.mlp.down_proj.weight"].equal(exact.bfloat16())


# --- what is saved -------------------------------------------------------------------------------------------


def test_a_resumed_adapter_takes_the_same_steps_bitwise(tmp_path: Path) -> None:
    original = trained(3, weight_decay=0.1)
    path = save(original, tmp_path)
    resumed = adapted_trainer(adapted_model(seed=9), weight_decay=0.1)
    checkpoint.restore(path, resumed)
    for _ in range(2):
        for name, row in original.rows().items():
            assert resumed.rows()[name].equal(row), name
        found, expected = take_step(resumed), take_step(original)
        assert (found["loss"], found["grad_norm"]) == (expected["loss"], expected["grad_norm"])


def test_a_checkpoint_holds_the_adapter_for_the_trainer_and_a_merged_model_for_anybody(tmp_path: Path) -> None:
    trainer = trained()
    path = save(trainer, tmp_path)
    names = [name for name in checkpoint.read_manifest(path).shapes]
    assert len(names) == 2 * NUM_ADAPTED
    plain = AutoModelForCausalLM.from_pretrained(path)
    load_model(str(path), lengths=Lengths(64, 256), dtype="float32")
    assert {file.name for file in path.glob("adapter*")} == set()
    found = dict(plain.named_parameters())
    assert found.keys() == trainer.rows().keys()
    for name, row in trainer.rows().items():
        assert found[name].equal(row), name


def test_a_snapshot_is_not_changed_by_the_steps_that_follow(tmp_path: Path) -> None:
    trainer = trained(2)
    before = {name: row.clone() for name, row in trainer.rows().items()}
    snapshot = checkpoint.Snapshot.of(trainer)
    take_step(trainer)
    assert all(snapshot.weights[name].equal(row) for name, row in before.items())


def test_a_checkpoint_without_adapters_is_refused_by_a_learner_with_them(tmp_path: Path) -> None:
    path = save(make_trainer(), tmp_path)
    with pytest.raises(CheckpointError, match=r"of another model: model\.embed_tokens\.weight is .* there and absent"):
        checkpoint.restore(path, adapted_trainer())


# --- the whole -----------------------------------------------------------------------------------------------


def reward_of(model: PreTrainedModel, wanted: int) -> float:
    """Probability of the token `wanted` behind the prompt of all groups of `guesses`."""
    group = guesses(0, wanted, None)
    with torch.no_grad():
        logprobs, _ = response_logprobs(model, pack(group)[0], 1.0)
    return float(logprobs[wanted].exp())


def guesses(step: int, wanted: int, model: PreTrainedModel | None) -> TrainGroup:
    """Responses of one token, drawn by the model (or each token once); those that are `wanted` are rewarded."""
    every = make_group([1] * VOCABULARY, step=step)
    every.token_ids[:] = np.arange(VOCABULARY)
    if model is None:
        return every
    with torch.no_grad():
        logprobs = response_logprobs(model, pack(every)[0], 1.0)[0].numpy()
    drawn = np.random.default_rng(step).choice(VOCABULARY, 64, p=np.exp(logprobs) / np.exp(logprobs).sum())
    group = make_group([1] * len(drawn), step=step, rewards=(drawn == wanted).tolist())
    group.prompt_tokens[:] = every.prompt_tokens
    group.token_ids[:], group.logprobs[:] = drawn, logprobs[drawn]
    return group


def test_training_the_adapters_raises_the_reward() -> None:
    trainer, wanted = adapted_trainer(), 3
    before = reward_of(trainer.model, wanted)
    for step in range(16):
        trainer.add_groups([guesses(step, wanted, trainer.model)])
        trainer.finish_step()
    assert before < 0.3
    assert reward_of(trainer.model, wanted) > 0.8


def test_the_shipped_model_is_trained_as_the_settings_say() -> None:
    config = run_config(loss={"kl_weight": 0.1})
    trainer = trainer_of(config, resolve_model_path("darts_async.quickstart:model"), None)
    losses = []
    for step in range(6):
        trainer.add_groups([make_group([6, 9, 4, 7], version=step, step=step, seed=1, rewards=[1, 0, 0.5, 0])])
        losses.append(trainer.finish_step()["loss"])
    assert len(trainer.shapes()) < len(trainer.row_shapes()) * 2
    assert losses[-1] < losses[0] - 0.05


def test_the_reference_is_the_model_without_its_adapters() -> None:
    group = make_group([3, 5, 2], step=3, rewards=[1, 0, 0.5])
    (batch,) = pack(group)
    trainer = trained(loss={"kl_weight": 0.1})
    with torch.no_grad(), adapters_off(trainer.model):
        off, _ = response_logprobs(trainer.model, batch, 1.0)
    assert off.equal(response_logprobs(packed_model(), batch, 1.0)[0])
    explicit = trained(loss={"kl_weight": 0.1}, reference=packed_model())
    found, expected = (each.add_groups([group]) for each in (trainer, explicit))
    assert found["reference_kl"] > 1e-4
    assert found == expected
    for name, gradient in gradients(explicit).items():
        assert gradients(trainer)[name].equal(gradient), name


# --- bad input -----------------------------------------------------------------------------------------------


def test_peft_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"learner\.lora needs the extra `lora`: pip install 'darts-async\[lora\]'"):
        adapted_model()
    make_trainer()  # without adapters nobody asks
    (problem,) = check_adapters(run_config())
    assert (problem.place, problem.fix) == ("learner.lora", "pip install 'darts-async[lora]'")
    assert list(check_adapters(RunConfig())) == []


def test_nothing_is_missing_where_peft_is_installed() -> None:
    assert list(check_adapters(run_config())) == []


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "nothing"])
def test_layers_that_cannot_have_adapters_are_named(name: str) -> None:
    with pytest.raises(ModelError, match=rf"names '{name}', but no linear layer .* there are down_proj, gate_proj, k_"):
        adapted_model(config=LoraConfig(target_modules=(name,)))
