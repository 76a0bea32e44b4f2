"""The quickstart's task, tokenizer, warm start and shipped model."""

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.quickstart import warm_start
from bench.quickstart.evaluate import Samples, evaluate, report, summarise
from bench.quickstart.responses import FLAWLESS, ResponseStyle, write_response
from bench.quickstart.tokenizer import EOS_ID, SPECIAL_TOKENS, VOCABULARY, build_tokenizer, save_tokenizer
from darts_async.errors import DataError
from darts_async.quickstart import MODEL_PATH
from darts_async.quickstart.task import (
    MAX_OPERATIONS,
    MIN_OPERATIONS,
    OPERATIONS,
    WORDS,
    ChainPrompt,
    apply_operation,
    draw_prompt,
    is_held_out,
    make_prompts,
    verify,
)

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
EXAMPLE = ChainPrompt("7 +5 *3 -9 =", "7", 3)


# --- prompts -------------------------------------------------------------------------------------------------


def test_every_operation_is_a_bijection_of_the_digits() -> None:
    for operation in OPERATIONS:
        assert {apply_operation(digit, operation) for digit in range(10)} == set(range(10))


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="'/2'"):
        apply_operation(4, "/2")


@settings(max_examples=20)
@given(seed=st.integers(0, 1 << 32), other_seed=st.integers(0, 1 << 32))
def test_training_and_held_out_prompts_are_disjoint_for_all_seeds(seed: int, other_seed: int) -> None:
    train, _ = make_prompts(60, 0, seed)
    _, held_out = make_prompts(0, 60, other_seed)
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}


def test_prompts_are_distinct_and_fixed_by_the_seed() -> None:
    train, held_out = make_prompts(2000, 128, seed=3)
    assert (train, held_out) == make_prompts(2000, 128, seed=3)
    assert train != make_prompts(2000, 128, seed=4)[0]
    assert len({prompt.text for prompt in train + held_out}) == 2128


def test_the_held_out_set_does_not_depend_on_the_number_of_training_prompts() -> None:
    assert make_prompts(10, 64, seed=0)[1] == make_prompts(500, 128, seed=0)[1][:64]


def test_prompts_are_the_same_in_another_process() -> None:
    # Hashes of strings differ between processes; nothing may depend on them.
    code = "from darts_async.quickstart.task import make_prompts; print(make_prompts(3, 3, 1))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.strip() == repr(make_prompts(3, 3, 1))


def test_difficulties_are_spread_evenly() -> None:
    train, _ = make_prompts(900, 0, seed=0)
    assert Counter(prompt.k for prompt in train) == dict.fromkeys(range(MIN_OPERATIONS, MAX_OPERATIONS + 1), 100)


def test_a_prompt_states_its_operations_and_its_answer() -> None:
    assert all(len(prompt.text.split()) == prompt.k + 2 for prompt in make_prompts(90, 0, seed=0)[0])
    start, *operations, _ = EXAMPLE.text.split()
    digit = int(start)
    for operation in operations:
        digit = apply_operation(digit, operation)
    assert str(digit) == EXAMPLE.answer


@pytest.mark.parametrize("counts", [(1_000_000, 0), (0, 100_000), (-1, 0)])
def test_more_prompts_than_there_are_texts_is_refused_with_the_limit(counts: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="can make 0 to"):
        make_prompts(*counts, seed=0)


def test_the_task_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, darts_async.quickstart.task; print({'torch', 'transformers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.strip() == "set()"


# --- responses and the verifier ------------------------------------------------------------------------------


def test_a_flawless_response_is_the_chain_and_its_answer() -> None:
    assert write_response(random.Random(0), EXAMPLE, FLAWLESS) == "+5 2 *3 6 -9 7 ans 7"


def test_a_copy_repeats_the_block_and_a_redo_repairs_it() -> None:
    one_block = replace(FLAWLESS, step_error=1.0, verify=1.0, turn_sticky=1.0, stickiness=0.0)
    copied = write_response(random.Random(0), EXAMPLE, replace(one_block, redo=0.0, copy_error=0.0)).split()
    assert copied[:6] == copied[7:13]
    assert copied[6] == "check"
    redone = write_response(random.Random(0), EXAMPLE, replace(one_block, redo=1.0, redo_error=0.0))
    assert redone.endswith("redo +5 2 *3 6 -9 7 ans 7")


@given(seed=st.integers(0, 1 << 32), k=st.integers(MIN_OPERATIONS, MAX_OPERATIONS))
def test_responses_are_whole_blocks_of_known_words_and_answer_with_their_last_result(seed: int, k: int) -> None:
    rng = random.Random(seed)
    words = write_response(rng, draw_prompt(rng, k), ResponseStyle()).split()
    assert set(words) <= set(WORDS)
    assert (len(words) - 2 - 2 * k) % (2 * k + 1) == 0
    assert words[-2:] == ["ans", words[-3]]


def test_responses_are_long_tailed_within_a_prompt() -> None:
    rng = random.Random(0)
    lengths = sorted(len(write_response(rng, EXAMPLE, ResponseStyle()).split()) for _ in range(2000))
    assert lengths[1980] > 4 * lengths[1000]


@pytest.mark.parametrize(
    ("response", "finished", "reward"),
    [
        ("+5 2 *3 6 -9 7 ans 7", True, 1.0),
        ("+5 3 *3 9 -9 0 check +5 2 *3 6 -9 7 ans 7", True, 1.0),
        ("ans 7", True, 1.0),
        ("+5 2 *3 6 -9 8 ans 8", True, 0.0),
        ("+5 2 *3 6 -9 7 ans 7", False, 0.0),
        ("ans 7 ans 8", True, 0.0),
        ("ans 7 check", True, 0.0),
        ("+5 2 *3 6 -9 7", True, 0.0),
        ("7", True, 0.0),
        ("", True, 0.0),
        ("answer 7", True, 0.0),
        ("ans +7", True, 0.0),
    ],
)
def test_only_a_finished_response_that_ends_with_the_right_answer_is_rewarded(
    response: str, finished: bool, reward: float
) -> None:
    assert verify(response, "7", finished) == reward


# --- tokenizer -----------------------------------------------------------------------------------------------


def test_each_word_is_one_token_and_texts_survive_the_round_trip() -> None:
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    for prompt in make_prompts(50, 0, seed=0)[0]:
        text = f"{prompt.text} {write_response(rng, prompt, ResponseStyle())}"
        ids = tokenizer.encode(text).ids
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*tokenizer.encode("ans 7").ids, EOS_ID]) == "ans 7"


def test_transformers_and_tokenizers_agree(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    for directory in (tmp_path, MODEL_PATH):
        ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
        theirs = AutoTokenizer.from_pretrained(directory)
        text = " ".join((*SPECIAL_TOKENS, *WORDS)) + " unheard-of"
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).ids == [*range(len(VOCABULARY)), VOCABULARY["<unk>"]]
        assert (theirs.eos_token_id, theirs.pad_token_id) == (EOS_ID, VOCABULARY["<pad>"])
        decoded = theirs.decode(ids, skip_special_tokens=True)
        assert decoded == ours.decode(ids) == " ".join(WORDS)


# --- warm start ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_do_not_see_each_other(attention: str) -> None:
    rng = random.Random(0)
    samples = [warm_start.CURRICULUM[-1].draw(rng) for _ in range(6)]
    model = warm_start.build_model(seed=0)
    model.set_attn_implementation(attention)
    packed = warm_start.pack(samples)
    together = warm_start.loss_of(model, packed)
    alone = [warm_start.loss_of(model, warm_start.pack([sample])) for sample in samples]
    weights = torch.tensor([float(len(ids) - prompt_length) for ids, prompt_length in samples])
    assert together.item() == pytest.approx(
        (torch.stack(alone) * weights).sum().item() / weights.sum().item(), abs=1e-5
    )


def test_labels_are_the_response_and_its_end() -> None:
    batch = warm_start.pack([([10, 11, 12, 13, EOS_ID], 2), ([20, 21, EOS_ID], 1)])
    ignored = warm_start.IGNORED
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.labels.tolist() == [[ignored, 12, 13, EOS_ID, ignored, 21, EOS_ID, ignored]]


def test_batches_keep_to_their_size_and_the_budget_and_leave_held_out_prompts_alone() -> None:
    phase = warm_start.CURRICULUM[0]
    batches = list(warm_start.draw_batches(random.Random(0), phase, 20_000))
    assert all(batch.token_ids.numel() <= phase.tokens_per_batch for batch in batches)
    assert 20_000 <= sum(batch.token_ids.numel() for batch in batches) < 20_000 + phase.tokens_per_batch
    tokenizer = build_tokenizer()
    texts = [tokenizer.decode(batch.token_ids[0].tolist()) for batch in batches]
    prompts = [" ".join(text.split()[: text.split().index("=") + 1]) for text in texts]
    assert not any(map(is_held_out, prompts))


@pytest.mark.slow
def test_the_warm_start_learns_and_writes_a_model_that_loads(tmp_path: Path) -> None:
    model = warm_start.build_model(seed=0)
    losses = warm_start.train(model, 30_000, seed=0)
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
    warm_start.save(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == MODEL_FILES
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    token_ids = torch.tensor([build_tokenizer().encode(EXAMPLE.text).ids])
    torch.testing.assert_close(loaded(token_ids).logits, model(token_ids).logits)


@pytest.mark.slow
def test_the_warm_start_is_fixed_by_its_seed() -> None:
    first, second, other = (_trained_embedding(seed) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def _trained_embedding(seed: int) -> torch.Tensor:
    model = warm_start.build_model(seed)
    warm_start.train(model, 4000, seed)
    return model.get_input_embeddings().weight.detach()  # type: ignore[no-any-return]


# --- the shipped model ---------------------------------------------------------------------------------------


def test_the_shipped_model_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_PATH.iterdir()}
    assert set(files) == MODEL_FILES | {"README.md"}
    assert sum(files.values()) < 4 << 20


@pytest.mark.slow
def test_the_shipped_model_solves_easy_held_out_prompts_greedily() -> None:
    samples = evaluate(MODEL_PATH, num_prompts=54, num_samples=1, max_new_tokens=64, greedy=True)
    easy = samples.rewards[samples.k <= 4]
    assert len(easy) == 18
    assert easy.mean() > 0.4  # chance is 0.1; the others go on verifying, hardly one answers wrongly
    assert samples.rewards[samples.finished].mean() > 0.95


@pytest.mark.slow
def test_the_shipped_model_leaves_room_to_learn_when_it_samples() -> None:
    summary = summarise(evaluate(MODEL_PATH, num_prompts=18, num_samples=8, max_new_tokens=128))
    assert 0.4 < summary.accuracy < 0.7
    assert summary.mixed_share > 0.8
    assert summary.length_p99 > 4 * summary.length_p50


def test_a_summary_separates_prompts_from_samples() -> None:
    lengths = torch.tensor([[10, 20], [30, 40]]).numpy()
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).numpy()
    samples = Samples(torch.tensor([2, 3]).numpy(), lengths, rewards, lengths < 40)
    summary = summarise(samples)
    assert summary.accuracy == 0.25
    assert (summary.length_mean, summary.length_max, summary.length_std_within_prompt) == (25, 40, 5)
    assert (summary.length_mean_right, summary.length_mean_wrong) == (10, 30)
    assert (summary.truncated_share, summary.mixed_share) == (0.25, 0.5)
    assert summary.correlation_within_prompt == pytest.approx(-(0.5**0.5))
    assert "k =  3   accuracy 0.000   mean length  35.0" in report(samples)
