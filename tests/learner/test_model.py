from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Model,
    ViTConfig,
)

from darts_async.errors import ModelError
from darts_async.learner.model import (
    checkpoint_activations,
    compile_model,
    load_model,
    use_packed_attention,
)
from darts_async.learner.packing import packed_attention as attention
from darts_async.learner.packing.batch import PackedBatch, micro_batches
from darts_async.models.length_limits import Lengths
from darts_async.protocol import TrainGroup
from tests.learner.world import (
    VOCABULARY,
    gradients,
    make_group,
    make_trainer,
    packed_model,
    plain_logprobs,
    plain_model,
    response_logprobs,
    weighted,
)
from tests.support.byte_tokenizer import write_tokenizer

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LENGTHS = [1, 7, 30, 2, 2, 19]
LENGTHS_OF_A_RUN = Lengths(64, 256)


def pack(group: TrainGroup, budget: int = 10_000, *, share_prompts: bool = True) -> list[PackedBatch]:
    parts = [weighted(group, np.ones(len(group.num_tokens), np.float32))]
    return list(micro_batches(parts, budget, share_prompts=share_prompts))


def one_by_one(model: PreTrainedModel, group: TrainGroup, temperature: float = 1.0) -> torch.Tensor:
    responses = np.split(group.token_ids, np.cumsum(group.num_tokens)[:-1])
    with torch.no_grad():
        return torch.cat([plain_logprobs(model, group.prompt_tokens, response, temperature) for response in responses])


@pytest.mark.parametrize("share_prompts", [False, True])
def test_packed_logprobs_equal_a_plain_forward_of_each_sample(share_prompts: bool) -> None:
    group = make_group(LENGTHS)
    for temperature in (1.0, 0.7):
        (batch,) = pack(group, share_prompts=share_prompts)
        logprobs, _ = response_logprobs(packed_model(), batch, temperature)
        torch.testing.assert_close(logprobs, one_by_one(plain_model(), group, temperature), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_packed_gradients_equal_those_of_a_plain_forward(share_prompts: bool) -> None:
    group = make_group(LENGTHS)
    packed, plain = packed_model(), plain_model()
    (batch,) = pack(group, share_prompts=share_prompts)
    assert len(batch.input_ids) == (59 if share_prompts else 79)
    response_logprobs(packed, batch, 1.0)[0].sum().backward()
    for response in np.split(group.token_ids, np.cumsum(group.num_tokens)[:-1]):
        plain_logprobs(plain, group.prompt_tokens, response).sum().backward()
    for ours, theirs in zip(packed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_micro_batches_give_the_logprobs_of_one_batch() -> None:
    group, model = make_group(LENGTHS), packed_model()
    (whole,) = pack(group)
    expected = response_logprobs(model, whole, 1.0)[0]
    samples = np.arange(len(LENGTHS), dtype=np.float32)  # as advantages, to find each sample's tokens again
    for batch in micro_batches([weighted(group, samples)], 20):
        for sample in batch.advantages.unique().tolist():
            found = response_logprobs(model, batch, 1.0)[0][batch.advantages == sample]
            tokens = whole.owners == int(sample)
            torch.testing.assert_close(found, expected[tokens], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_gives_the_same_numbers_and_gradients(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # or it would be set for all tests behind this one
    # What is traced and differentiated is the same; generating C++ for it would take minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    (batch,) = pack(make_group(LENGTHS))
    found = []
    for model in (packed_model(), packed_model()):
        if found:
            compile_model(model)
        if checkpointing:
            checkpoint_activations(model)
        logprobs, entropy = response_logprobs(model, batch, 0.7, entropy_gradient=True)
        (logprobs - entropy).sum().backward()
        found.append([logprobs, entropy, *(weight.grad for weight in model.parameters())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_a_model_without_layers_is_not_compiled() -> None:
    model = packed_model()
    model._no_split_modules = None
    with pytest.raises(ModelError, match=r"learner\.compile is on"):
        compile_model(model)


def test_changing_one_sample_does_not_change_another() -> None:
    group, model = make_group([5, 6, 7]), packed_model()
    tokens = group.token_ids.copy()
    tokens[5:11] = (tokens[5:11] + 1) % VOCABULARY
    changed = TrainGroup(**{name: getattr(group, name) for name in group.__struct_fields__} | {"token_ids": tokens})
    before, after = (response_logprobs(model, pack(one)[0], 1.0)[0] for one in (group, changed))
    assert before[:5].equal(after[:5])
    assert before[11:].equal(after[11:])
    assert before[5] != after[5], "another target"
    assert not before[6:11].equal(after[6:11])


def test_entropy_is_that_of_the_distribution_at_the_temperature() -> None:
    group = make_group([4])
    (batch,) = pack(group)
    tokens = torch.from_numpy(np.concatenate([group.prompt_tokens, group.token_ids]).astype(np.int64))
    with torch.no_grad():
        logits = plain_model()(input_ids=tokens[None]).logits[0, 3:-1]
    expected = torch.distributions.Categorical(logits=logits / 0.5).entropy()
    logprobs, entropy = response_logprobs(packed_model(), batch, 0.5)
    torch.testing.assert_close(entropy, expected, atol=1e-5, rtol=0)
    assert logprobs.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, **HEADS, **TOKENS),
        MistralConfig(**SIZES, **HEADS, **TOKENS, sliding_window=4),
        GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, initializer_range=0.2, **TOKENS),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_pack_too(config: PreTrainedConfig) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    group = make_group(LENGTHS)
    expected = one_by_one(model, group)
    use_packed_attention(model)
    (batch,) = pack(group)
    torch.testing.assert_close(response_logprobs(model, batch, 1.0)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MambaConfig(**SIZES, **TOKENS), "its logits differ"),
        (Gemma2Config(**SIZES, **HEADS, **TOKENS), "softcap"),
        (BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=2, n_head=4, **TOKENS), "built in"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_that_cannot_keep_samples_apart_is_refused(config: PreTrainedConfig, message: str) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match=message):
        use_packed_attention(model)


def test_a_model_whose_samples_cannot_share_a_prompt_has_it_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def hide_the_trunk(trunk: int, branches: Sequence[int], window: int | None, device: torch.device) -> torch.Tensor:
        seen = of_branches(trunk, branches, window, device)
        seen[:, :trunk] = False
        return seen

    of_branches = attention._of_branches
    monkeypatch.setattr(attention, "_of_branches", hide_the_trunk)
    with structlog.testing.capture_logs() as logs:
        model = packed_model()
    assert [entry["event"] for entry in logs] == ["prompts_are_not_shared"]
    group = make_group(LENGTHS, rewards=[1, 0, 0, 1, 1, 0])
    found, expected = make_trainer(model), make_trainer(share_prompts=False)
    for trainer in (found, expected):
        trainer.add_groups([group])
    for name, gradient in gradients(expected).items():
        assert gradients(found)[name].equal(gradient)


def test_a_packed_model_refuses_a_plain_call() -> None:
    with pytest.raises(ModelError, match="was not given the trees"):
        packed_model()(input_ids=torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_loads_and_scores_as_before(tmp_path: Path, dtype: str) -> None:
    original = packed_model(dtype=getattr(torch, dtype))
    original.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), lengths=LENGTHS_OF_A_RUN, dtype=dtype)
    (batch,) = pack(make_group([3, 4]))
    assert response_logprobs(loaded, batch, 1.0)[0].equal(response_logprobs(original, batch, 1.0)[0])
    assert not loaded.training


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    plain_model().save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=r"'<\|im_end\|>' with id 258, but the model's vocabulary has 16 rows"):
        load_model(str(tmp_path), lengths=LENGTHS_OF_A_RUN, dtype="float32")


def test_a_model_with_more_rows_than_its_tokenizer_has_tokens_is_taken(tmp_path: Path) -> None:
    """Vocabularies are often rounded up."""
    model = plain_model()
    model.resize_token_embeddings(320)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    load_model(str(tmp_path), lengths=LENGTHS_OF_A_RUN, dtype="float32")


def test_activation_checkpointing_keeps_less_for_the_same_gradient() -> None:
    (batch,) = pack(make_group(LENGTHS))
    kept, gradients = [], []
    for checkpointing in (False, True):
        model = packed_model()
        if checkpointing:
            checkpoint_activations(model)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            logprobs = response_logprobs(model, batch, 1.0)[0]
        logprobs.sum().backward()
        kept.append(sum(sizes))
        gradients.append([weight.grad for weight in model.parameters()])
        assert not any(module.training for module in model.modules() if not list(module.children()))
    assert kept[1] < kept[0] / 3
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_model_without_layers_to_checkpoint_is_refused() -> None:
    with pytest.raises(ModelError, match="activation_checkpointing is on, but Linear does not support it"):
        checkpoint_activations(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/no/such/model", "./absent"])
def test_a_missing_directory_is_named(path: str) -> None:
    with pytest.raises(ModelError, match=f"{path}, but there is no such directory"):
        load_model(path, lengths=LENGTHS_OF_A_RUN, dtype="float32")


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no causal language model can be loaded"):
        load_model(str(tmp_path), lengths=LENGTHS_OF_A_RUN, dtype="float32")


@pytest.mark.slow
def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no causal language model can be loaded from it: Unrecognized configuration"):
        load_model(str(tmp_path), lengths=LENGTHS_OF_A_RUN, dtype="float32")


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    config = plain_model().config
    config.tie_word_embeddings = False
    Qwen3Model(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lack lm_head\.weight"):
        load_model(str(tmp_path), lengths=LENGTHS_OF_A_RUN, dtype="float32")


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'float17'; use one of float32, bfloat16"):
        load_model(str(tmp_path), lengths=LENGTHS_OF_A_RUN, dtype="float17")
