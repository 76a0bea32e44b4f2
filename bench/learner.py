"""How fast does the learner train, and how does that compare with padding, and with TRL's GRPO trainer?

    python -m bench.learner [--repeats N] [--threads N ...] [--prompt-tokens N ...] [--seed N]
    python -m bench.learner --gpu [--size 0.6B|1.7B] [--tokens 8192] [--compile] [--not-shared] [--repeats N]

On a CPU four learners take the same steps in turn, on the same groups with long-tailed lengths, from the same random
weights: ours; ours with the prompt before each sample (`learner.share_prompts: false`); a plain loop that pads each
group to its longest response; and TRL's trainer, whose own loss is computed on the same padded groups. Each step is one
forward and backward pass per group and one step of AdamW. Tokens per second count response tokens; ratios are medians
over rounds, in each of which the four follow one another, by the clock and by the processor time used (which other work
on the machine does not change, but waiting threads do). TRL (of the extra `bench`) is left out where it is not
installed.

With a GPU, `--gpu` measures ours alone, in bfloat16 with groups of so many packed tokens, and how much of the device's
peak the model's operations use; with `--compile` as `learner.compile` has it. With `--not-shared` the same groups take
more passes, and packed tokens are counted as if they did not.
"""

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any, Final

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from darts_async.advantage import group_advantages
from darts_async.config import LearnerConfig
from darts_async.learner.intake import num_packed_tokens
from darts_async.learner.model import compile_model, use_packed_attention
from darts_async.learner.objective import Objective
from darts_async.learner.step import Trainer
from darts_async.protocol import TrainGroup
from darts_async.quickstart import MODEL_PATH

GROUPS_PER_STEP: Final = 2
SAMPLES_PER_GROUP: Final = 8
MEDIAN_TOKENS: Final = 60
SPREAD: Final = 1.0
"""Deviation of the logarithm of the lengths: the longest of eight is about four times the median."""
MAX_NEW_TOKENS: Final = 512
PROMPT_TOKENS: Final = 24
LEARNING_RATE: Final = 1e-5
CLIP: Final = (0.2, 0.28)
CPU_SIZE: Final = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
}
GPU_SIZES: Final = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}
GPU_SHAPE: Final = {
    "vocab_size": 151936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
GPU_TOKENS: Final = 8192

Step = Callable[[list[TrainGroup]], None]
"""Trains on the groups and updates the weights."""
Seconds = dict[str, list[float]]
"""Of each learner's step in each round."""
COLUMNS: Final = ("ours", "not shared", "padded", "TRL")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[PROMPT_TOKENS, 10 * PROMPT_TOKENS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--size", choices=GPU_SIZES, default="0.6B")
    parser.add_argument("--tokens", type=int, default=GPU_TOKENS, help="packed tokens of a pass on the GPU")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--not-shared", action="store_true", help="on the GPU: the prompt before each of its samples")
    arguments = parser.parse_args()
    if min(arguments.prompt_tokens) < 1:
        parser.error(f"--prompt-tokens {min(arguments.prompt_tokens)}: a prompt has at least one token")
    if arguments.gpu and arguments.tokens < 2 * arguments.prompt_tokens[0]:
        parser.error(
            f"--tokens {arguments.tokens} hold little besides a prompt of {arguments.prompt_tokens[0]} tokens "
            "(--prompt-tokens); give twice as many at least"
        )
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    if arguments.gpu:
        measure_gpu(arguments)
    else:
        measure_cpu(arguments)


def measure_cpu(arguments: argparse.Namespace) -> None:
    """Print one line per number of threads and of tokens in a prompt."""
    model = make_model(CPU_SIZE, torch.float32, arguments.seed)
    steps: dict[str, Step] = {
        "ours": our_step(model),
        "not shared": our_step(model, share_prompts=False),
        "padded": padded_step(model),
    }
    if find_spec("trl") is not None:
        steps["TRL"] = trl_step(model)
    lengths = make_lengths(arguments.seed).ravel()
    padded = int(make_lengths(arguments.seed).max(axis=1).sum()) * SAMPLES_PER_GROUP
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters, fp32")
    print(
        f"{len(lengths)} responses, {lengths.sum()} tokens (median {np.median(lengths):.0f}, longest {lengths.max()})"
    )
    print(f"{padded} tokens when padded")
    others = COLUMNS[1:]
    titles = [f"{name}, tokens/s" for name in COLUMNS]
    titles += [f"ours / {name}{by}" for by in ("", " by CPU time") for name in others]
    print(f"| {' | '.join(['threads', 'prompt', *titles])} |")
    print("|---|---|" + "---|" * (len(COLUMNS) + 2 * len(others)))
    for count in arguments.threads:
        torch.set_num_threads(count)
        for num_prompt_tokens in arguments.prompt_tokens:
            groups = make_groups(arguments.seed, CPU_SIZE["vocab_size"], num_prompt_tokens)
            clock, processor = interleaved(steps, groups, arguments.repeats)
            found = [f"{lengths.sum() / median(clock[name]):,.0f}" if name in clock else "-" for name in COLUMNS]
            found += [ratio(seconds, name) for seconds in (clock, processor) for name in others]
            print(f"| {' | '.join([str(count), str(num_prompt_tokens), *found])} |", flush=True)


def interleaved(steps: dict[str, Step], groups: list[TrainGroup], repeats: int) -> tuple[Seconds, Seconds]:
    """Seconds by the clock and of processor time, after one round that does not count."""
    clock: Seconds = {name: [] for name in steps}
    processor: Seconds = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            started_s, cpu_s = time.perf_counter(), time.process_time()
            step(groups)
            if turn:
                clock[name].append(time.perf_counter() - started_s)
                processor[name].append(time.process_time() - cpu_s)
    return clock, processor


def ratio(seconds: Seconds, other: str) -> str:
    """How many times as fast as `other` ours is: the median, and the lowest and highest of the rounds."""
    if other not in seconds:
        return "-"
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[other], strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def make_model(size: dict[str, int], dtype: torch.dtype, seed: int, device: str = "cpu") -> PreTrainedModel:
    """A Qwen3 with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(**size, tie_word_embeddings=True, max_position_embeddings=GPU_TOKENS)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_lengths(seed: int) -> NDArray[np.int32]:
    """Of the responses of each group of a step, log-normal."""
    shape = (GROUPS_PER_STEP, SAMPLES_PER_GROUP)
    found = np.random.default_rng(seed).lognormal(np.log(MEDIAN_TOKENS), SPREAD, shape)
    return np.clip(found, 4, MAX_NEW_TOKENS).astype(np.int32)


def make_groups(seed: int, vocabulary: int, num_prompt_tokens: int) -> list[TrainGroup]:
    """The groups of a step."""
    rng = np.random.default_rng((seed, 1))
    return [make_group(rng, index, row, vocabulary, num_prompt_tokens) for index, row in enumerate(make_lengths(seed))]


def make_group(
    rng: np.random.Generator, index: int, lengths: NDArray[np.int32], vocabulary: int, num_prompt_tokens: int
) -> TrainGroup:
    """Random tokens of these lengths; half of the samples have a reward."""
    total = int(lengths.sum())
    return TrainGroup(
        group_id=index,
        step=0,
        prompt_tokens=rng.integers(0, vocabulary, num_prompt_tokens, dtype=np.int32),
        num_tokens=lengths,
        token_ids=rng.integers(0, vocabulary, total, dtype=np.int32),
        logprobs=rng.normal(-np.log(vocabulary), 0.1, total).astype(np.float32),
        versions=np.zeros(total, np.int32),
        rewards=np.resize([1.0, 0.0], len(lengths)).astype(np.float32),
        weights=np.ones(len(lengths), np.float32),
    )


def our_step(source: PreTrainedModel, *, share_prompts: bool = True) -> Step:
    """The learner of this package."""
    model = copy.deepcopy(source)
    use_packed_attention(model)
    trainer = make_trainer(model, share_prompts=share_prompts)

    def step(groups: list[TrainGroup]) -> None:
        trainer.policy_version = 0  # the groups are those of step 0, again and again
        for group in groups:
            trainer.add_groups([group])
        trainer.finish_step()

    return step


def make_trainer(model: PreTrainedModel, num_tokens: int = GPU_TOKENS, *, share_prompts: bool = True) -> Trainer:
    """With DAPO's loss, the default, and so many tokens in a pass."""
    config = LearnerConfig(learning_rate=LEARNING_RATE, tokens_per_micro_batch=num_tokens, share_prompts=share_prompts)
    objective = Objective(model, config, temperature=1.0, baseline="group", max_new_tokens=MAX_NEW_TOKENS)
    return Trainer(model, config, objective, max_staleness=1)


def padded_step(source: PreTrainedModel) -> Step:
    """The loop that comes to mind first: pad, mask, log-softmax, clipped loss, mean over tokens."""
    model = copy.deepcopy(source)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step(groups: list[TrainGroup]) -> None:
        num_tokens = sum(len(group.token_ids) for group in groups)
        for group in groups:
            batch = pad(group)
            logits = model(
                input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
                logits_to_keep=batch["completion_ids"].shape[1] + 1,
                use_cache=False,
            ).logits[:, :-1]
            logprobs = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
            ratios = (logprobs - batch["old_per_token_logps"]).exp()
            advantages = batch["advantages"][:, None]
            clipped = ratios.clamp(1 - CLIP[0], 1 + CLIP[1])
            losses = -torch.minimum(ratios * advantages, clipped * advantages) * batch["completion_mask"]
            torch.autograd.backward(losses.sum() / num_tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def trl_step(source: PreTrainedModel) -> Step:
    """TRL's trainer: its `compute_loss` on each group, padded to the group's own longest response."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="bench-trl-"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        loss_type="dapo",
        epsilon=CLIP[0],
        epsilon_high=CLIP[1],
        max_completion_length=MAX_NEW_TOKENS,
        per_device_train_batch_size=SAMPLES_PER_GROUP,
        num_generations=SAMPLES_PER_GROUP,
        learning_rate=LEARNING_RATE,
    )
    trainer: Any = GRPOTrainer(
        model=copy.deepcopy(source),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * SAMPLES_PER_GROUP}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(str(MODEL_PATH)),
    )
    trainer.model.eval()
    optimiser = torch.optim.AdamW(trainer.model.parameters(), lr=LEARNING_RATE)

    def step(groups: list[TrainGroup]) -> None:
        num_tokens = torch.tensor(sum(len(group.token_ids) for group in groups))
        for group in groups:
            trainer.compute_loss(trainer.model, {**pad(group), "num_items_in_batch": num_tokens}).backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def pad(group: TrainGroup) -> dict[str, Tensor]:
    """The group with its responses padded to the longest, under the names that TRL's loss has for them."""

    def rows(values: Any) -> Tensor:
        parts = np.split(values, np.cumsum(group.num_tokens)[:-1])
        return pad_sequence([torch.from_numpy(part) for part in parts], batch_first=True)

    prompt = torch.from_numpy(group.prompt_tokens).long().expand(len(group.num_tokens), -1)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": rows(group.token_ids).long(),
        "completion_mask": rows(np.ones(len(group.token_ids), np.int64)),
        "advantages": torch.from_numpy(group_advantages(group.rewards, group.weights, normalise=True)),
        "old_per_token_logps": rows(group.logprobs),
    }


def measure_gpu(arguments: argparse.Namespace) -> None:
    """Print tokens per second and the share of the device's peak, of steps of a pass for each group."""
    if not torch.cuda.is_available():
        raise SystemExit("--gpu needs a CUDA device, and there is none; without --gpu the CPU is measured")
    model = make_model(GPU_SHAPE | GPU_SIZES[arguments.size], torch.bfloat16, arguments.seed, device="cuda")
    use_packed_attention(model)
    if arguments.compile:
        compile_model(model)
    trainer = make_trainer(model, arguments.tokens, share_prompts=not arguments.not_shared)
    num_prompt_tokens = arguments.prompt_tokens[0]
    print(
        f"{torch.cuda.get_device_name()}, Qwen3 of {arguments.size}, bf16, {arguments.tokens} packed tokens in a pass"
        f"{', compiled' if arguments.compile else ''}, prompts of {num_prompt_tokens} tokens"
        f"{' before each sample' if arguments.not_shared else ''}"
    )
    print("| step | packed tokens/s | response tokens/s | TFLOP/s | MFU | memory, GiB |\n|---|---|---|---|---|---|")
    for turn in range(arguments.repeats + 1):
        rng = np.random.default_rng((arguments.seed, turn))
        groups = [full_group(rng, index, arguments.tokens, num_prompt_tokens) for index in range(GROUPS_PER_STEP)]
        packed = sum(num_packed_tokens(group) for group in groups)
        trainer.policy_version = 0
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        for group in groups:
            trainer.add_groups([group])
        metrics = trainer.finish_step()
        torch.cuda.synchronize()
        rate = packed / (time.perf_counter() - started_s)
        share, memory = metrics.get("mfu", float("nan")), torch.cuda.max_memory_allocated() / 2**30
        name = turn or "warm-up"
        print(
            f"| {name} | {rate:,.0f} | {metrics['tokens_per_second']:,.0f} | {metrics['tflops_per_second']:.0f} "
            f"| {share:.1%} | {memory:.1f} |",
            flush=True,
        )


def full_group(rng: np.random.Generator, index: int, num_tokens: int, num_prompt_tokens: int) -> TrainGroup:
    """A group that fills one pass, with its prompt once: log-normal lengths until the next sample would not fit."""
    lengths: list[int] = []
    left = num_tokens - num_prompt_tokens
    while left > 1:
        length = int(np.clip(rng.lognormal(np.log(8 * MEDIAN_TOKENS), SPREAD), 8, left + 1))
        lengths.append(length)
        left -= length - 1
    return make_group(rng, index, np.array(lengths, np.int32), GPU_SHAPE["vocab_size"], num_prompt_tokens)


if __name__ == "__main__":
    main()
