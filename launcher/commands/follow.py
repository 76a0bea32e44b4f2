"""`darts-launch follow`: gives the metrics of a run, live or over, to sinks."""

import asyncio
import contextlib
import json
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.topology.run_files import CONFIG_FILE, METRICS_FILE
from launcher.commands.verbs import RUNS, RunsDir, bad_input, goes_on, split_words, the_run
from launcher.config_file import load_config
from launcher.preflight.extension_check import check_sinks
from launcher.problems import InputError
from launcher.settings_tree import Overrides
from launcher.sinks.follower import only_follower, read_memory
from launcher.sinks.followers import CLOSE_WITHIN_S, Followers
from launcher.terminal import Screen, write_line

OK, FAILED, INTERRUPTED = 0, 1, 130
_POLL_S = 0.5


def follow(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN_DIR|NAME=VALUE", help="The run, and settings: telemetry.wandb.project=mine"),
    ] = None,
    sinks: Annotated[
        list[str] | None,
        typer.Option("--sink", help="wandb, tensorboard, trackio, mlflow or module:name. May be repeated."),
    ] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Give the metrics of a run to sinks: those that it has, and new ones until it ends.

    The default is the newest run, and the sinks of its telemetry.sinks. It may be interrupted and called again: it
    continues after what each sink has.
    """
    with bad_input():
        run_dir, settings = split_words(words or [])
        found = the_run(run_dir, runs_dir, is_live=False)
        config = _config(found, settings, sinks)
        if problems := tuple(check_sinks(config)):
            raise InputError(found / CONFIG_FILE, problems)
        for name in config.telemetry.sinks:
            with only_follower(found, name):
                pass
    raise typer.Exit(asyncio.run(_follow(found, config)))


def _config(run_dir: Path, settings: list[str], sinks: list[str] | None) -> RunConfig:
    """The settings of the run, with those that were given. Raises `InputError` or `ConfigError`."""
    file = run_dir / CONFIG_FILE
    named = [f"telemetry.sinks={json.dumps(sinks)}"] if sinks else []
    config = load_config(file, Overrides(words=(*settings, *named)))
    if not config.telemetry.sinks:
        choices = "wandb, tensorboard, trackio, mlflow or module:name"
        raise ConfigError(f"{file} has no telemetry.sinks: name one with --sink: {choices}")
    return config


async def _follow(run_dir: Path, config: RunConfig) -> int:
    """Follow until the run has ended, or until a signal. Returns the exit code."""
    names, interrupted = config.telemetry.sinks, asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupted.set)
    followers = Followers(run_dir, config, names, close_within_s=None)
    write_line(f"{run_dir}: {', '.join(names)}")
    async with followers:
        while not (interrupted.is_set() or followers.all_done):
            if not goes_on(run_dir):
                followers.finish()
            _show(followers)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(interrupted.wait(), _POLL_S)
        if interrupted.is_set():
            followers.close_within_s = CLOSE_WITHIN_S
    _show(followers)
    for name in names:
        if name not in followers.unserved:
            write_line(f"{name} has {read_memory(run_dir, name).num_lines} lines of {METRICS_FILE}")
    if interrupted.is_set():
        return INTERRUPTED
    return FAILED if followers.unserved else OK


def _show(followers: Followers) -> None:
    for text in followers.take_notices():
        Screen(stderr=True).print(Text.assemble(("! ", "yellow"), text), soft_wrap=True)
