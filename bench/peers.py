"""How long until the model is as good? Ours and TRL's GRPO trainer, on the same model, task, prompts and machine.

    python -m bench.peers [--target 0.9] [--seeds 0 1 2] [--steps 100] [--max-minutes 20] [--out DIR]

Both start from the shipped model and train on the quickstart's prompts with the same loss (DAPO, clip 0.2 and 0.28, no
divergence term), 16 prompts of 8 samples in a step, the same AdamW, 256 new tokens at temperature 1. The clock runs
until the held-out reward, the mean over 128 prompts of 4 fresh samples each, is at the target for the first time; it is
looked at every 10 steps, by the same code: in TRL's trainer while the clock stands still, in ours afterwards, from
checkpoints, which it writes while the clock goes on. Starting counts for neither. Runs take turns, seed by seed. A run
that does not get there counts with its whole time, and as such.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from bench.charts import Panel, draw_curves, for_plots
from bench.measured import launch, quickstart
from bench.results import conditions, keep
from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.learner.checkpoint import CHECKPOINTS_DIR, directory_of
from darts_async.models import resolve_model_path
from darts_async.prompts.load import PromptSets, load_prompts
from darts_async.quickstart.evaluate import sample_prompts
from darts_async.quickstart.task import verify
from darts_async.quickstart.tokenizer import EOS_ID
from launcher.cluster import load_config

EVERY_STEPS = 10
NUM_PROMPTS, NUM_SAMPLES = 16, 8
OURS: dict[str, dict[str, Any]] = {
    "darts_async, no shaping": {"rule": "none", "launch": NUM_SAMPLES, "keep": NUM_SAMPLES},
    "darts_async, survivor 6 + 2 of 12": {
        "rule": "survivor",
        "launch": 12,
        "keep": NUM_SAMPLES,
        "shortest": 6,
        "longest": 2,
    },
    "darts_async, qlpo 8 of 12": {"rule": "qlpo", "launch": 12, "keep": NUM_SAMPLES},
}
TRL = "TRL"
PLOT = "peers.png"


@dataclass(frozen=True, slots=True)
class Climb:
    """The held-out reward of one run over time."""

    name: str
    seed: int
    rewards: list[tuple[float, int, float]]
    """(seconds since training began, steps, held-out reward)"""

    def reached(self, target: float) -> tuple[float, int, bool]:
        """Seconds and steps to the target, or of the whole run, and whether it is there."""
        for seconds, steps, reward in self.rewards:
            if reward >= target:
                return seconds, steps, True
        seconds, steps, _ = self.rewards[-1]
        return seconds, steps, False


def main() -> None:
    """One command; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.9, help="held-out reward; the shipped model has about 0.57")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-minutes", type=float, default=20.0, help="after which TRL's trainer is stopped")
    parser.add_argument("--out", type=for_plots, help="directory for peers.md, .json and .png")
    arguments = parser.parse_args()
    if arguments.steps < EVERY_STEPS:
        parser.error(
            f"--steps {arguments.steps}: the held-out reward is looked at every {EVERY_STEPS} steps; give that many"
        )
    try:
        import trl  # noqa: F401  (it is needed in an hour, so say now that it is not there)
    except ImportError:
        sys.exit("error: TRL is not installed: pip install 'darts-async[test]' brings the version compared with here")
    climbs: list[Climb] = []
    try:
        for seed in arguments.seeds:
            for name in OURS:
                climbs.append(ours(name, seed, arguments.steps))
                show(climbs[-1], arguments.target)
            climbs.append(trls(seed, arguments.steps, arguments.max_minutes * 60, arguments.target))
            show(climbs[-1], arguments.target)
            write(arguments, climbs)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(report(arguments, climbs))


def show(climb: Climb, target: float) -> None:
    """A line for who waits."""
    seconds, steps, is_there = climb.reached(target)
    print(
        f"seed {climb.seed}, {climb.name}: {seconds:.0f} s, {steps} steps{'' if is_there else ' (not there)'}",
        flush=True,
    )


def settings_of(shaping: dict[str, Any], seed: int, num_steps: int) -> dict[str, Any]:
    """The quickstart's, with this shaping, and a checkpoint of each model that is to be evaluated."""
    settings = quickstart()
    settings["learner"] |= {
        "steps": num_steps,
        "groups_per_step": NUM_PROMPTS,
        "checkpoint_every": EVERY_STEPS,
        "keep_checkpoints": num_steps // EVERY_STEPS + 1,
    }
    return settings | {"seed": seed, "shaping": shaping}


def config_of(settings: dict[str, Any]) -> RunConfig:
    """As `darts-launch` reads it."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "cluster.yaml"
        path.write_text(yaml.safe_dump(settings))
        return load_config(path)


def ours(name: str, seed: int, num_steps: int) -> Climb:
    """A run of the real processes. Raises `ConfigError` if it fails."""
    with tempfile.TemporaryDirectory() as home:
        run_dir = launch(settings_of(OURS[name], seed, num_steps), Path(home))
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        config = load_config(run_dir / "config.yaml")
        sets = load_prompts(config)
        first = next(line for line in lines if line["type"] == "evaluation")
        trained_s = {0: 0.0} | {
            line["step"] + 1: line["elapsed_s"] - first["elapsed_s"] for line in lines if line["type"] == "step"
        }
        models = {0: resolve_model_path(config.model.path)} | {
            steps: directory_of(run_dir / CHECKPOINTS_DIR, steps)
            for steps in range(EVERY_STEPS, num_steps + 1, EVERY_STEPS)
        }
        torch.manual_seed(seed)
        rewards = [
            (trained_s[steps], steps, held_out_reward(load_model(path), config, sets)) for steps, path in models.items()
        ]
    return Climb(name, seed, rewards)


def load_model(path: Path) -> Any:
    """Of a directory, as transformers load it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def trls(seed: int, num_steps: int, max_s: float, target: float) -> Climb:
    """TRL's trainer in this process, until it is there, out of steps or out of time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from transformers import PreTrainedTokenizerFast, TrainerCallback
        from trl import GRPOTrainer

    config = config_of(settings_of(next(iter(OURS.values())), seed, num_steps))
    model_path = resolve_model_path(config.model.path)
    sets = load_prompts(config)
    torch.manual_seed(seed)
    torch.set_num_threads(os.cpu_count() or 1)

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Evaluates, with the clock standing still."""

        def __init__(self) -> None:
            self.rewards: list[tuple[float, int, float]] = []
            self.paused_s = 0.0
            self.began_s = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> Any:
            if state.global_step % EVERY_STEPS == 0:
                self.look(known["model"], state.global_step)
                seconds, _, reward = self.rewards[-1]
                control.should_training_stop = reward >= target or seconds > max_s
            return control

        def look(self, model: Any, steps: int) -> None:
            now_s = time.monotonic()
            self.rewards.append((now_s - self.began_s - self.paused_s, steps, held_out_reward(model, config, sets)))
            self.paused_s += time.monotonic() - now_s

    with tempfile.TemporaryDirectory() as home:
        trainer = GRPOTrainer(
            model=load_model(model_path),
            reward_funcs=reward_function(model_path),
            args=grpo_settings(config, num_steps, home),
            train_dataset=Dataset.from_dict(
                {"prompt": [prompt.text for prompt in sets.train], "answer": [prompt.answer for prompt in sets.train]}
            ),
            processing_class=PreTrainedTokenizerFast.from_pretrained(str(model_path)),
        )
        watch = Watch()
        watch.look(trainer.model, 0)
        trainer.add_callback(watch)
        watch.began_s, watch.paused_s = time.monotonic(), 0.0
        trainer.train()
    return Climb(TRL, seed, watch.rewards)


def grpo_settings(config: RunConfig, num_steps: int, directory: str) -> Any:
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
        logging_steps=num_steps,
        seed=config.seed,
        gradient_checkpointing=False,
        max_steps=num_steps,
        per_device_train_batch_size=NUM_PROMPTS * NUM_SAMPLES,
        num_generations=NUM_SAMPLES,
        max_completion_length=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
        loss_type="dapo",
        beta=0.0,
        epsilon=learner.loss.clip_low,
        epsilon_high=learner.loss.clip_high,
        learning_rate=learner.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=learner.betas[0],
        adam_beta2=learner.betas[1],
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.max_grad_norm,
    )


def reward_function(model_path: Path) -> Callable[..., list[float]]:
    """The verifier of the quickstart, as TRL calls it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))

    def judge(completion_ids: Sequence[Sequence[int]], answer: Sequence[str], **_: Any) -> list[float]:
        texts = tokenizer.decode_batch([list(ids) for ids in completion_ids])
        finished = [bool(len(ids)) and ids[-1] == EOS_ID for ids in completion_ids]
        return [verify(*judged) for judged in zip(texts, answer, finished, strict=True)]

    return judge


def held_out_reward(model: Any, config: RunConfig, sets: PromptSets) -> float:
    """As our evaluation: fresh samples of the held-out prompts, none cut off by a rule."""
    is_training = model.training
    model.eval()
    samples = sample_prompts(
        model,
        resolve_model_path(config.model.path),
        [(prompt.text, prompt.answer) for prompt in sets.held_out],
        num_samples=config.evaluation.samples_per_prompt,
        max_new_tokens=config.sampling.max_new_tokens,
    )
    model.train(is_training)
    return float(samples.rewards.mean())


def report(arguments: argparse.Namespace, climbs: Sequence[Climb]) -> str:
    """The table."""
    lines = [
        "# Time to a held-out reward, beside TRL",
        "",
        f"{conditions('peers')} Medians over {len(arguments.seeds)} seeds, and the range.",
        "",
        f"![held-out reward over time]({PLOT})",
        "",
        f"| trainer | seconds to {arguments.target:g} | steps | seconds a step | TRL's time over its own | not there |",
        "|---|---|---|---|---|---|",
    ]
    theirs = {climb.seed: climb.reached(arguments.target)[0] for climb in climbs if climb.name == TRL}
    for name in (*OURS, TRL):
        runs = [climb for climb in climbs if climb.name == name and climb.seed in theirs]
        ends = [climb.reached(arguments.target) for climb in runs]
        seconds, steps = [end[0] for end in ends], [float(end[1]) for end in ends]
        ratios = [theirs[climb.seed] / end[0] for climb, end in zip(runs, ends, strict=True)]
        rates = [end[0] / max(end[1], 1) for end in ends]
        cells = (ranged(seconds, ".0f"), ranged(steps, ".0f"), ranged(rates, ".2f"), ranged(ratios, ".2f"))
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(not end[2] for end in ends)} |")
    return "\n".join(lines) + "\n"


def ranged(values: Sequence[float], style: str) -> str:
    """The median, and the range where there is one."""
    text = format(median(values), style)
    return text if len(values) == 1 else f"{text} ({min(values):{style}} to {max(values):{style}})"


def write(arguments: argparse.Namespace, climbs: Sequence[Climb]) -> None:
    """The table, the numbers and the plot, if they are wanted."""
    if arguments.out is None:
        return
    keep(arguments.out, "peers", report(arguments, climbs), {"runs": [asdict(climb) for climb in climbs]})
    panels = [
        Panel(
            "seconds of training",
            "held-out reward",
            {
                climb.name: [(seconds, reward) for seconds, _, reward in climb.rewards]
                for climb in climbs
                if climb.seed == seed
            },
            title=f"seed {seed}",
            levels={"target": arguments.target},
        )
        for seed in dict.fromkeys(climb.seed for climb in climbs)
    ]
    draw_curves(arguments.out / PLOT, panels)


if __name__ == "__main__":
    main()
