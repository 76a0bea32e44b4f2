"""`darts-launch follow`: gives the metrics of a run, live or over, to sinks."""

import asyncio
import contextlib
import json
import signal
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.text import Text

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.topology.run_files import CONFIG_FILE, METRICS_FILE
from launcher.commands.verbs import RUNS, bad_input, goes_on
from launcher.config_file import load_config, parse_config
from launcher.control.find_run import find_run
from launcher.preflight.extension_check import check_sinks
from launcher.problems import InputError
from launcher.sinks.follower import only_follower, read_memory
from launcher.sinks.followers import CLOSE_WITHIN_S, Followers
from launcher.terminal import Screen, write_line

OK, FAILED, INTERRUPTED = 0, 1, 130
_POLL_S = 0.5


def follow(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN_DIR] [NAME=VALUE]...", help="The run, and settings: telemetry.wandb.project=mine"),
    ] = None,
    sinks: Annotated[
        list[str] | None,
        typer.Option("--sink", help="wandb, tensorboard, trackio, mlflow or module:name. May be repeated."),
    ] = None,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="Directory in which to look for the newest run.")] = RUNS,
) -> None:
    """Give the metrics of a run to sinks: those that it has, and new ones until it ends.

    The default is the newest live run, and the sinks of its telemetry.sinks. It may be interrupted and called again: it
    continues after what each sink has.
    """
    with bad_input():
        run_dir, settings = _split(words or [])
        found = find_run(run_dir, runs_dir)
        config = _config(found, settings, sinks)
        if problems := tuple(check_sinks(config)):
            raise InputError(found / CONFIG_FILE, problems)
        for name in config.telemetry.sinks:
            with only_follower(found, name):
                pass
    raise typer.Exit(asyncio.run(_follow(found, config)))


def _split(words: list[str]) -> tuple[Path | None, list[str]]:
    runs = [word for word in words if "=" not in word or Path(word).is_dir()]
    if len(runs) > 1:
        raise ConfigError(f"expected [RUN_DIR] [NAME=VALUE]..., found {' and '.join(map(repr, runs))}")
    return (Path(runs[0]) if runs else None), [word for word in words if word not in runs]


def _config(run_dir: Path, settings: list[str], sinks: list[str] | None) -> RunConfig:
    """The settings of the run, with those that were given. Raises `InputError` or `ConfigError`."""
    file = run_dir / CONFIG_FILE
    tree: Any = load_config(file).model_dump(mode="json")
    for word in (*settings, *([f"telemetry.sinks={json.dumps(sinks)}"] if sinks else [])):
        place, _, text = word.partition("=")
        *sections, name = place.split(".")
        section = tree
        for key in sections:
            if not isinstance(section := section.get(key), dict):
                raise ConfigError(f"{word!r}: there is no section {'.'.join(sections)!r}; see {file}")
        try:
            section[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{word!r}: the value cannot be read as YAML; put it in quotes") from error
    config = parse_config(yaml.safe_dump(tree, sort_keys=False), file)
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
