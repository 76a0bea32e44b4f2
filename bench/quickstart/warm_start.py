"""Makes the shipped model: supervised training on written responses, from nothing, by a curriculum.

    python -m bench.quickstart.warm_start --out DIR [--tokens 4000000] [--seed 0] [--evaluate]

The budget is in tokens, not in time, so on one machine a seed gives one model. Samples are packed without
padding, several in one row whose positions start again at 0 with each sample. Transformers derives the
attention mask from those positions, but only when no cache is in use: hence `use_cache=False`, without which
samples would see each other. The loss is the cross entropy of the response and its end-of-sequence token.

The order of the curriculum is what makes a model of this size learn: single operations first, then whole chains
with slips, and verification last. Copying is learnt late, after about 3M tokens: a smaller budget misses it.

The shipped model (defaults, 8 to 13 minutes on one thread), 252 held-out prompts x 16 samples at temperature 1:
accuracy .58, from .81 (k = 2) to .37 (k = 10); length mean 40, p50 23, p90 92, p99 212, mean from 17 to 64 by k,
standard deviation within a prompt 40; mean length 36 if right and 45 if wrong, correlation of length and reward
-.10 over all samples (harder prompts are longer) and -.01 within a prompt; every prompt mixed.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from bench.quickstart.evaluate import evaluate, report
from bench.quickstart.responses import CONCISE, FLAWLESS, ResponseStyle, write_response
from bench.quickstart.tokenizer import EOS_ID, PAD_ID, VOCABULARY, save_tokenizer
from darts_async.quickstart.task import MAX_OPERATIONS, MIN_OPERATIONS, draw_prompt, is_held_out

DEFAULT_TOKENS = 4_000_000
PEAK_RATE, FINAL_RATE_SHARE = 3e-3, 0.05
WARMUP_STEPS = 30
MAX_GRAD_NORM = 1.0
IGNORED = -100  # the label that cross entropy leaves out


Sample = tuple[list[int], int]
"""Token ids of a prompt with its response and end of sequence, and how many of them are the prompt's."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the curriculum."""

    token_share: float
    """Of the whole budget."""
    tokens_per_batch: int
    draw: Callable[[random.Random], Sample]
    decays: bool = False
    """The rate falls by a cosine from its peak to its final share; otherwise it stays at the peak."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Complete samples one after another in one row."""

    token_ids: Tensor  # [1, num_tokens]
    position_ids: Tensor  # [1, num_tokens], from 0 in each sample
    labels: Tensor  # [1, num_tokens], the next token, or IGNORED where it is not of the response


def draw_sample(rng: random.Random, min_k: int, max_k: int, style: ResponseStyle) -> Sample:
    """A prompt of the training pool, with a response."""
    prompt = draw_prompt(rng, rng.randint(min_k, max_k))
    while is_held_out(prompt.text):
        prompt = draw_prompt(rng, prompt.k)
    prompt_ids = [VOCABULARY[word] for word in prompt.text.split()]
    response_ids = [VOCABULARY[word] for word in write_response(rng, prompt, style).split()]
    return [*prompt_ids, *response_ids, EOS_ID], len(prompt_ids)


CURRICULUM = (
    Phase(0.05, 256, partial(draw_sample, min_k=1, max_k=2, style=FLAWLESS)),
    Phase(0.28, 512, partial(draw_sample, min_k=MIN_OPERATIONS, max_k=MAX_OPERATIONS, style=CONCISE)),
    Phase(
        0.67,
        1024,
        partial(draw_sample, min_k=MIN_OPERATIONS, max_k=MAX_OPERATIONS, style=ResponseStyle()),
        decays=True,
    ),
)


def build_model(seed: int) -> Qwen3ForCausalLM:
    """An untrained model of 0.3M parameters."""
    config = Qwen3Config(
        vocab_size=64,  # more than the words of the task: a round number of rows
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    assert len(VOCABULARY) <= config.vocab_size
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """One row of samples."""
    token_ids: list[int] = []
    position_ids: list[int] = []
    labels: list[int] = []
    for sample_ids, prompt_length in samples:
        token_ids += sample_ids
        position_ids += range(len(sample_ids))
        labels += [IGNORED] * (prompt_length - 1) + sample_ids[prompt_length:] + [IGNORED]
    return PackedBatch(torch.tensor([token_ids]), torch.tensor([position_ids]), torch.tensor([labels]))


def draw_batches(rng: random.Random, phase: Phase, budget_tokens: int) -> Iterator[PackedBatch]:
    """Batches of at most `tokens_per_batch` until the budget is used. Longer samples are drawn again."""
    samples: list[Sample] = []
    filled = drawn = 0
    while drawn < budget_tokens:
        sample = phase.draw(rng)
        length = len(sample[0])
        if length > phase.tokens_per_batch:
            continue
        if filled + length > phase.tokens_per_batch:
            yield pack(samples)
            samples, filled = [], 0
        samples.append(sample)
        filled += length
        drawn += length
    yield pack(samples)


def loss_of(model: Qwen3ForCausalLM, batch: PackedBatch) -> Tensor:
    """Mean cross entropy of the response tokens."""
    logits = model(input_ids=batch.token_ids, position_ids=batch.position_ids, use_cache=False).logits
    return functional.cross_entropy(logits[0], batch.labels[0], ignore_index=IGNORED)


def rate_at(step: int, progress: float, phase: Phase) -> float:
    """The learning rate at an optimiser step, where `progress` is the share of the phase's tokens used."""
    rate = PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
    if phase.decays:
        rate *= FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * (1 + cos(pi * progress)) / 2
    return rate


def train(
    model: Qwen3ForCausalLM, budget_tokens: int, seed: int, curriculum: Sequence[Phase] = CURRICULUM
) -> list[float]:
    """Run a curriculum. Returns the loss of each step."""
    rng = random.Random(f"warm-start/{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    losses: list[float] = []
    model.train()
    for number, phase in enumerate(curriculum, 1):
        phase_tokens, used = int(budget_tokens * phase.token_share), 0
        for batch in draw_batches(rng, phase, phase_tokens):
            rate = rate_at(len(losses), min(1.0, used / phase_tokens), phase)
            losses.append(_step(model, optimizer, batch, rate))
            used += batch.token_ids.numel()
            if len(losses) % 100 == 0:
                recent = sum(losses[-100:]) / 100
                typer.echo(
                    f"phase {number}  step {len(losses):5d}  tokens {used:7d}  rate {rate:.1e}  loss {recent:.3f}"
                )
    return losses


def save(model: Qwen3ForCausalLM, directory: Path, vocabulary: dict[str, int] = VOCABULARY) -> None:
    """Write model, generation settings and tokenizer in Hugging Face format."""
    directory.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    model.save_pretrained(directory)
    save_tokenizer(directory, vocabulary)


def _step(model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, batch: PackedBatch, rate: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, batch)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return loss.item()


def main(
    out: Annotated[Path, typer.Option(help="Directory that the model is written to.")],
    tokens: Annotated[int, typer.Option(help="Budget of training tokens.")] = DEFAULT_TOKENS,
    seed: Annotated[int, typer.Option(help="Seeds weights and samples.")] = 0,
    evaluate_after: Annotated[bool, typer.Option("--evaluate", help="Measure it on held-out prompts.")] = False,
) -> None:
    """Train the quickstart's model and write it."""
    torch.set_num_threads(1)
    model = build_model(seed)
    train(model, tokens, seed)
    save(model, out)
    if evaluate_after:
        typer.echo(report(evaluate(out)))


if __name__ == "__main__":
    typer.run(main)
