"""The command line: `darts-launch cluster.yaml`, or a verb and its arguments.

    exit code 0     the run finished, or the file is valid
              1     the run failed, or the audit found something
              2     the input cannot be run; nothing was started
              130   interrupted

A verb is a function with `@app.command()`; those for a run that goes on are in `verbs`. What is not a verb is taken as
the file of a run.
"""

import asyncio
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from darts_async.config import RunConfig
from darts_async.errors import TransportError
from darts_async.faults import VARIABLE, parse_faults
from darts_async.limits import raise_open_files
from darts_async.topology import CONFIG_FILE, LAUNCHER, RunPlan, read_plan
from darts_async.transport import create_run_keys
from launcher.cluster import load_config
from launcher.control import open_control
from launcher.course import Limits, Outcome
from launcher.dry_run import dry_run_screen
from launcher.ending import failure_screen
from launcher.live import find_run, record_of
from launcher.past import NO_PAST, Past, held, read_past
from launcher.plan import hub_addresses, plan_run
from launcher.preflight import check_run, link_ports
from launcher.problems import InputError, Problem, missing_screen, problem_screen
from launcher.run import run as carry_out
from launcher.rundir import KEYS_DIR, SUMMARY_FILE, create_run_dir, run_dir_name, write_inputs
from launcher.summary import Summary, summary_screen
from launcher.verbs import VERBS, bad_input
from launcher.view import make_display

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_EXIT_CODES = {"finished": OK, "failed": FAILED, "stopped": INTERRUPTED}
_DEFAULT_VERB = "run"


class _FileOrVerb(TyperGroup):
    """Puts `run` in front of arguments that name no verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [word for word in args if not word.startswith("-")]
        if words and words[0] not in self.commands:
            args = [_DEFAULT_VERB, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_FileOrVerb,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Trains a language model as one YAML file says: darts-launch [--dry-run] FILE.yaml",
)

RunFile = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The cluster and the run.")]


for _verb in VERBS:
    app.command()(_verb)


def main() -> None:
    """Entry point of `darts-launch`."""
    raise_open_files()
    app(prog_name="darts-launch")


@app.command(_DEFAULT_VERB)
def run_command(
    file: RunFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be started, and start nothing.")] = False,
) -> None:
    """Run FILE.yaml (the verb may be left out)."""
    config, _ = _checked(file, starts=not dry_run)
    if dry_run:
        Console().print(dry_run_screen(config, _plan(config, Path(config.runs_dir) / run_dir_name(config.name))))
        return
    outcome, summary = _run(config)
    _show_end(outcome, summary)
    raise typer.Exit(_EXIT_CODES[outcome.status])


@app.command()
def resume(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run.")]) -> None:
    """Go on with a run that was stopped, failed or killed, from where it stood."""
    with bad_input():
        found = find_run(run_dir, Path()).absolute()
        with held(found):
            directory = record_of(found).directory
            if directory and Path(directory).is_dir():  # where relative paths of the settings begin
                os.chdir(directory)
            past = read_past(found, read_plan(found))
            config, _ = _checked(found / CONFIG_FILE, starts=True)
            outcome, summary = _conduct(config, _plan(config, found), found, past)
    _show_end(outcome, summary)
    raise typer.Exit(_EXIT_CODES[outcome.status])


@app.command()
def validate(file: RunFile) -> None:
    """Check FILE.yaml and everything it names, and start nothing."""
    _, missing = _checked(file, starts=False)
    Console().print(f"[green]✓[/] {file} {'is valid' if missing else 'can be run'}", highlight=False)


def _limits(config: RunConfig) -> Limits:
    return Limits(
        finish_s=config.learner.finish_timeout_s,
        save_s=config.learner.stop_timeout_s,
        no_progress_s=config.telemetry.no_progress_timeout_s,
    )


def _checked(file: Path, *, starts: bool) -> tuple[RunConfig, tuple[Problem, ...]]:
    """The settings of a file that can be run, and what this machine lacks for it; otherwise shows why not and leaves.

    Where the run `starts`, what the machine lacks is a reason to leave; else it is shown as a warning.
    """
    with bad_input():
        parse_faults(os.environ.get(VARIABLE, ""), LAUNCHER)
    try:
        config = load_config(file)
        problems = check_run(config, reaches_nodes=starts)
        refused = tuple(problem for problem in problems if starts or not problem.here)
        if refused:
            raise InputError(file, refused)
    except InputError as error:
        Console(stderr=True).print(problem_screen(error))
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if problems:
        Console(stderr=True).print(missing_screen(file, problems))
    return config, problems


def _plan(config: RunConfig, run_dir: Path) -> RunPlan:
    return plan_run(config, run_dir, hub_addresses(config, link_ports(config)))


def _run(config: RunConfig) -> tuple[Outcome, Summary]:
    run_dir = create_run_dir(config)
    plan = _plan(config, run_dir)
    create_run_keys(run_dir / KEYS_DIR, plan.endpoints())
    with held(run_dir):
        return _conduct(config, plan, run_dir, NO_PAST)


def _conduct(config: RunConfig, plan: RunPlan, run_dir: Path, past: Past) -> tuple[Outcome, Summary]:
    write_inputs(run_dir, config, plan)
    (run_dir / SUMMARY_FILE).unlink(missing_ok=True)  # of the life before
    display = make_display(Console())
    try:
        control = partial(open_control, plan, run_dir, config.transport, past.life)
        return asyncio.run(
            carry_out(config, plan, run_dir, open_control=control, display=display, limits=_limits(config), past=past)
        )
    except TransportError as error:
        display.close()
        _give_up(f"the launcher's own link cannot be opened: {error}")
    finally:
        display.close()


def _show_end(outcome: Outcome, summary: Summary) -> None:
    Console().print(summary_screen(summary))
    if outcome.status == "failed":
        Console(stderr=True).print(failure_screen(outcome, Path(summary.run_dir)))


def _give_up(message: str) -> NoReturn:
    Console(stderr=True).print(f"[red]✗[/] {message}", highlight=False)
    raise typer.Exit(FAILED)
