"""Measures a model on held-out prompts of the chain task by un-aborted samples at temperature 1.

    python -m bench.quickstart.evaluate DIR [--prompts 126] [--samples 16] [--seed 0]

Lengths count the end-of-sequence token; a sample without one at the cap counts with the cap, as wrong.
"""

from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from bench.quickstart.tokenizer import EOS_ID
from darts_async.quickstart.task import ChainPrompt, make_prompts, verify


@dataclass(frozen=True, slots=True)
class Samples:
    """Scored samples, a row per prompt."""

    k: NDArray[np.int64]  # [num_prompts]
    lengths: NDArray[np.int64]  # [num_prompts, num_samples], tokens
    rewards: NDArray[np.float64]  # [num_prompts, num_samples]
    finished: NDArray[np.bool_]  # [num_prompts, num_samples]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a pool of samples shows. Lengths are in tokens."""

    accuracy: float
    length_mean: float
    length_p50: float
    length_p90: float
    length_p99: float
    length_max: float
    length_std_within_prompt: float
    """Root of the mean variance of a prompt's lengths."""
    truncated_share: float
    mixed_share: float
    """Prompts with both right and wrong samples."""
    length_mean_right: float
    length_mean_wrong: float
    correlation: float
    """Of length and reward over all samples."""
    correlation_within_prompt: float
    """The same of deviations from the prompt's means."""


def evaluate(
    model_path: Path,
    *,
    num_prompts: int = 126,
    num_samples: int = 16,
    max_new_tokens: int = 512,
    greedy: bool = False,
    seed: int = 0,
) -> Samples:
    """Sample held-out prompts with the model in a directory and score them."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    prompts = sorted(make_prompts(0, num_prompts, seed)[1], key=lambda prompt: prompt.k)
    decoding = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None} if greedy else {}
    torch.manual_seed(seed)
    # Prompts of one difficulty have one length, so that no batch needs padding.
    parts = [
        _sample(model, tokenizer, list(same_k), num_samples, {"max_new_tokens": max_new_tokens, **decoding})
        for _, same_k in groupby(prompts, key=lambda prompt: prompt.k)
    ]
    return Samples(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Samples)))


def summarise(samples: Samples) -> Summary:
    """The summary of a pool."""
    lengths, rewards = samples.lengths.astype(np.float64), samples.rewards
    accuracy_of_prompt = rewards.mean(1)
    p50, p90, p99 = np.percentile(lengths, (50, 90, 99))
    deviations = (rows - rows.mean(1, keepdims=True) for rows in (lengths, rewards))
    return Summary(
        accuracy=float(rewards.mean()),
        length_mean=float(lengths.mean()),
        length_p50=float(p50),
        length_p90=float(p90),
        length_p99=float(p99),
        length_max=float(lengths.max()),
        length_std_within_prompt=float(np.sqrt(lengths.var(1).mean())),
        truncated_share=float(1 - samples.finished.mean()),
        mixed_share=float(((accuracy_of_prompt > 0) & (accuracy_of_prompt < 1)).mean()),
        length_mean_right=_mean(lengths[rewards == 1]),
        length_mean_wrong=_mean(lengths[rewards == 0]),
        correlation=_correlation(lengths, rewards),
        correlation_within_prompt=_correlation(*deviations),
    )


def report(samples: Samples) -> str:
    """The summary and the numbers by difficulty, as lines of text."""
    summary = summarise(samples)
    lines = [f"{field.name:26s} {getattr(summary, field.name):8.3f}" for field in fields(Summary)]
    for k in np.unique(samples.k):
        rows = samples.k == k
        lengths, accuracy = samples.lengths[rows], samples.rewards[rows].mean()
        lines.append(f"k = {k:2d}   accuracy {accuracy:.3f}   mean length {lengths.mean():5.1f}")
    return "\n".join(lines)


@torch.inference_mode()
def _sample(
    model: AutoModelForCausalLM,
    tokenizer: Tokenizer,
    prompts: list[ChainPrompt],
    num_samples: int,
    decoding: dict[str, Any],
) -> Samples:
    token_ids = torch.tensor([tokenizer.encode(prompt.text).ids for prompt in prompts for _ in range(num_samples)])
    output = model.generate(token_ids, attention_mask=torch.ones_like(token_ids), **decoding)
    responses = output[:, token_ids.shape[1] :].numpy()  # [num_rows, num_tokens], padded after the end
    ended = responses == EOS_ID
    finished = ended.any(1)
    lengths = np.where(finished, ended.argmax(1) + 1, responses.shape[1])
    texts = tokenizer.decode_batch([list(row[:length]) for row, length in zip(responses, lengths, strict=True)])
    answers = [prompt.answer for prompt in prompts for _ in range(num_samples)]
    rewards = np.array([verify(*scored) for scored in zip(texts, answers, finished.tolist(), strict=True)])
    shape = (len(prompts), num_samples)
    k = np.array([prompt.k for prompt in prompts])
    return Samples(k, lengths.reshape(shape), rewards.reshape(shape), finished.reshape(shape))


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Pearson's; 0 where one side does not vary."""
    if left.std() == 0 or right.std() == 0:
        return 0.0
    return float(np.corrcoef(left.ravel(), right.ravel())[0, 1])


def main(
    path: Annotated[Path, typer.Argument(help="Directory of the model.")],
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 126,
    samples: Annotated[int, typer.Option(help="Samples of each.")] = 16,
    seed: Annotated[int, typer.Option(help="Seeds prompts and samples.")] = 0,
) -> None:
    """Measure a model on held-out prompts."""
    typer.echo(report(evaluate(path, num_prompts=prompts, num_samples=samples, seed=seed)))


if __name__ == "__main__":
    typer.run(main)
