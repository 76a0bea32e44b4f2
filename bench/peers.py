"""How long until the model is as good? Ours and TRL's GRPO trainer, on the same model, tasks, prompts and machine.

    python -m bench.peers [--tasks chain search] [--seeds 0 1 2] [--max-new-tokens 256] [--max-minutes 20]
                          [--out DIR] [--resume] [--work DIR]

`chain` is the quickstart's task; `search` that of `bench.search_task`, with longer answers that get longer still, whose
model is made first (minutes; it is kept in --work). Both trainers start from the same model and train on the same
prompts with the same loss (DAPO, clip 0.2 and 0.28, no divergence term), 16 prompts of 8 samples in a step, the same
AdamW and cap on responses, temperature 1. The clock runs until the held-out reward, the mean over 128 prompts of 4
fresh samples each, is at the task's target for the first time; it is looked at every few steps, by the same code: in
TRL's trainer while the clock stands still, in ours afterwards, from checkpoints, which it writes while the clock goes
on. Starting counts for neither. Runs take turns, seed by seed. A run that does not get there counts with its whole
time, and as such. --resume takes over the runs that are in --out.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
import yaml

from bench import learning
from bench.charts import for_plots
from bench.measured import launch
from bench.peers_report import RACES, SCHEMA, TRL, Climb, Results, draw, report
from bench.probing import Judge, sampled
from bench.quickstart.tokenizer import EOS_ID
from bench.results import commit, keep, taken_over
from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.learner.checkpoints.checkpoint import directory_of
from darts_async.models.location import load_tokenizer, resolve_model_path
from darts_async.prompts.load import load_prompts
from darts_async.prompts.source import Prompt
from darts_async.topology.run_files import CHECKPOINTS_DIR
from launcher.config_file import load_config

NUM_PROMPTS, NUM_SAMPLES = 16, 8
EVALUATED_SAMPLES = 4
OURS: dict[str, dict[str, Any]] = {
    "darts_async, no shaping": {"rule": "none", "launch": NUM_SAMPLES, "keep": NUM_SAMPLES},
    "darts_async, survivor 6 + 2 of 12": {
        "rule": "survivor",
        "launch": 12,
        "keep": NUM_SAMPLES,
        "shortest": 6,
        "longest": 2,
    },
    "darts_async, qlpo 8 of 10": {"rule": "qlpo", "launch": 10, "keep": NUM_SAMPLES},
}
NAME = "peers"


def main() -> None:
    """One command; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=RACES, default=list(RACES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-new-tokens", type=int, nargs="+", default=[256], help="caps on responses, one by one")
    parser.add_argument("--max-minutes", type=float, default=20.0, help="after which TRL's trainer is stopped")
    parser.add_argument("--out", type=for_plots, help="directory for peers.md, peers.json and plots")
    parser.add_argument("--resume", action="store_true", help="go on from the peers.json that is in --out")
    parser.add_argument("--work", type=Path, help="directory that keeps the second task's model")
    arguments = parser.parse_args()
    try:
        import trl  # noqa: F401  (it is needed in an hour, so say now that it is not there)
    except ImportError:
        sys.exit("error: TRL is not installed: pip install 'darts-async[bench]' brings the version compared with here")
    transformers.logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            print(run(arguments, arguments.work or Path(scratch)))
    except ConfigError as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace, work: Path) -> str:
    """All runs that are still to be done; returns the tables. Raises `ConfigError` if one of ours fails."""
    found = taken_over(arguments, NAME, Results, SCHEMA) or Results(commits=[], runs=[])
    for task, cap in product(arguments.tasks, arguments.max_new_tokens):
        settings = settings_of(task, work, cap)
        for seed, name in product(arguments.seeds, (*OURS, TRL)):
            if found.has(task, cap, name, seed):
                continue
            if name == TRL:
                rewards = trls(task, settings, seed, arguments.max_minutes * 60)
            else:
                rewards = ours(task, name, settings, seed)
            found.runs.append(Climb(task, cap, name, seed, rewards))
            found.commits = list(dict.fromkeys([*found.commits, commit()]))
            show(found.runs[-1])
            write(arguments, found)
    write(arguments, found)
    return report(found)


def show(climb: Climb) -> None:
    """A line for who waits."""
    seconds, steps, is_there = climb.reached()
    print(
        f"{climb.task}, at most {climb.max_new_tokens}, seed {climb.seed}, {climb.name}: {seconds:.0f} s, {steps} steps"
        f"{'' if is_there else ' (not there)'}",
        flush=True,
    )


def settings_of(task: str, work: Path, max_new_tokens: int) -> dict[str, Any]:
    """Those of `bench.learning`, evaluated on the clock at no time, with a checkpoint of each model that is to be."""
    race = RACES[task]
    settings = learning.settings_of(task, work)
    settings["evaluation"] |= {"samples_per_prompt": EVALUATED_SAMPLES, "every_steps": 0}
    settings["sampling"] |= {"max_new_tokens": max_new_tokens}
    settings["generator"] |= {"max_context_tokens": settings["prompts"]["max_prompt_tokens"] + max_new_tokens}
    settings["learner"] |= {
        "steps": race.steps,
        "groups_per_step": NUM_PROMPTS,
        "checkpoint_every": race.every_steps,
        "keep_checkpoints": race.steps // race.every_steps + 1,
    }
    return settings


def with_shaping(settings: Mapping[str, Any], shaping: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same, for one run."""
    return {**settings, "seed": seed, "shaping": shaping}


def config_of(settings: dict[str, Any]) -> RunConfig:
    """As `darts-launch` reads it."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "cluster.yaml"
        path.write_text(yaml.safe_dump(settings))
        return load_config(path)


def ours(task: str, name: str, settings: Mapping[str, Any], seed: int) -> list[tuple[float, int, float]]:
    """The climb of a run of the real processes. Raises `ConfigError` if it fails."""
    with tempfile.TemporaryDirectory() as home:
        run_dir = launch(with_shaping(settings, OURS[name], seed), Path(home))
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        config = load_config(run_dir / "config.yaml")
        held_out = load_prompts(config).held_out
        first = next(line for line in lines if line["type"] == "evaluation")
        trained_s = {0: 0.0} | {
            line["step"] + 1: line["elapsed_s"] - first["elapsed_s"] for line in lines if line["type"] == "step"
        }
        every, last = config.learner.checkpoint_every, config.learner.steps
        models = {0: resolve_model_path(config.model.path)} | {
            steps: directory_of(run_dir / CHECKPOINTS_DIR, steps) for steps in range(every, last + 1, every)
        }
        return [
            (trained_s[steps], steps, held_out_reward(path, config, held_out, learning.JUDGES[task]))
            for steps, path in models.items()
        ]


def trls(task: str, settings: Mapping[str, Any], seed: int, max_s: float) -> list[tuple[float, int, float]]:
    """The climb of TRL's trainer in this process, until it is there, out of steps or out of time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
        from trl import GRPOTrainer

    config = config_of(with_shaping(settings, next(iter(OURS.values())), seed))
    model_path, judge, race = resolve_model_path(config.model.path), learning.JUDGES[task], RACES[task]
    sets = load_prompts(config)
    torch.manual_seed(seed)
    torch.set_num_threads(os.cpu_count() or 1)
    rewards: list[tuple[float, int, float]] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Evaluates, with the clock standing still."""

        def __init__(self) -> None:
            self.began_s, self.paused_s = time.monotonic(), 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if state.global_step % race.every_steps == 0:
                seconds, reward = self.look(state.global_step)
                control.should_training_stop = reward >= race.target or seconds > max_s
            return control

        def look(self, steps: int) -> tuple[float, float]:
            now_s = time.monotonic()
            path = Path(home) / "looked_at"
            trainer.save_model(str(path))
            reward = held_out_reward(path, config, sets.held_out, judge)
            rewards.append((now_s - self.began_s - self.paused_s, steps, reward))
            self.paused_s += time.monotonic() - now_s
            return rewards[-1][0], reward

    with tempfile.TemporaryDirectory() as home:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_path),
            reward_funcs=reward_function(model_path, judge),
            args=grpo_settings(config, home),
            train_dataset=Dataset.from_dict(
                {"prompt": [prompt.text for prompt in sets.train], "answer": [prompt.answer for prompt in sets.train]}
            ),
            processing_class=PreTrainedTokenizerFast.from_pretrained(str(model_path)),
        )
        watch = Watch()
        watch.look(0)
        trainer.add_callback(watch)
        watch.began_s, watch.paused_s = time.monotonic(), 0.0
        trainer.train()
    return rewards


def grpo_settings(config: RunConfig, directory: str) -> Any:
    """What of ours TRL has a setting for."""
    from trl import GRPOConfig

    learner = config.learner
    return GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=learner.steps,
        seed=config.seed,
        gradient_checkpointing=False,
        max_steps=learner.steps,
        per_device_train_batch_size=NUM_PROMPTS * NUM_SAMPLES,
        num_generations=NUM_SAMPLES,
        max_completion_length=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
        loss_type="dapo",
        beta=0.0,
        epsilon=learner.loss.clip_low or 0.0,
        epsilon_high=learner.loss.clip_high,
        learning_rate=learner.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=learner.betas[0],
        adam_beta2=learner.betas[1],
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.max_grad_norm,
    )


def reward_function(model_path: Path, judge: Judge) -> Callable[..., list[float]]:
    """The verifier of the task, as TRL calls it."""
    tokenizer = load_tokenizer(model_path)

    def judged(completion_ids: Sequence[Sequence[int]], answer: Sequence[str], **_: Any) -> list[float]:
        texts = tokenizer.decode_batch([list(ids) for ids in completion_ids])
        finished = [bool(len(ids)) and ids[-1] == EOS_ID for ids in completion_ids]
        return [judge(*response) for response in zip(texts, answer, finished, strict=True)]

    return judged


def held_out_reward(model_path: Path, config: RunConfig, held_out: Sequence[Prompt], judge: Judge) -> float:
    """As our evaluation: fresh samples of the held-out prompts, none cut off by a rule."""
    samples = asyncio.run(sampled(model_path, held_out, EVALUATED_SAMPLES, config.sampling, judge, config.seed))
    return float(samples.rewards.mean())


def write(arguments: argparse.Namespace, found: Results) -> None:
    """The tables, the numbers and the plots, if they are wanted."""
    if arguments.out is None:
        return
    keep(arguments.out, NAME, report(found), msgspec.to_builtins(found), schema=SCHEMA)
    draw(found, arguments.out)


if __name__ == "__main__":
    main()
