"""The learning rate as a pure function of the step, so that no checkpoint has to keep a scheduler.

With n steps done, warmup W, T steps in all and floor f, the share of the peak rate is

    (n + 1) / W                                     while n < W
    1                                               `constant`
    1 - (1 - f) x                                   `linear`
    f + (1 - f) (1 + cos(pi x)) / 2                 `cosine` (SGDR without restarts, arXiv 1608.03983)

where x = (n - W) / (T - W) goes from 0 at the end of the warmup to 1 after the last step.
"""

import math

from darts_async.config import LearnerConfig


def learning_rate(config: LearnerConfig, num_steps_done: int) -> float:
    """The rate of step `num_steps_done`, counted from 0."""
    return config.learning_rate * _share(config, num_steps_done)


def _share(config: LearnerConfig, num_steps_done: int) -> float:
    if num_steps_done < config.warmup_steps:
        return (num_steps_done + 1) / config.warmup_steps
    num_steps = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (num_steps_done - config.warmup_steps) / num_steps)
    floor = config.final_rate_share
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - floor) * progress
        case "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
