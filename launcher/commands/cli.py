"""The command line: `darts-launch cluster.yaml`, or a verb and its arguments.

    exit code 0     the run finished, or the file is valid
              1     the run failed, or the audit found something
              2     the input cannot be run; nothing was started
              130   interrupted: Ctrl-C, SIGTERM, SIGHUP, or the verb `down`

A verb is a function with `@app.command()`. The verbs for an existing run are in `verbs`. A first argument that is not a
verb names the file of a run.
"""

import asyncio
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from msgspec import structs
from rich.text import Text
from typer.core import TyperGroup

from darts_async.config import RunConfig
from darts_async.errors import ConfigError, DataError, NoSpaceError, TransportError
from darts_async.faults import VARIABLE, parse_faults
from darts_async.machine.full_disk import is_no_space
from darts_async.machine.spawn import raise_open_files
from darts_async.prompts.hub import with_commits
from darts_async.topology.plan import RunPlan, read_plan
from darts_async.topology.roles import LAUNCHER
from darts_async.topology.run_files import CONFIG_FILE, KEYS_DIR, SUMMARY_FILE
from darts_async.transport import create_run_keys, renew_run_keys
from launcher.analysis.earlier_lives import NO_PAST, Past, held, read_past
from launcher.commands.dashboard import dashboard
from launcher.commands.dry_run import dry_run_screen
from launcher.commands.evaluation import as_evaluation
from launcher.commands.follow import follow
from launcher.commands.samples import samples
from launcher.commands.validate_screen import validate_screen
from launcher.commands.verbs import RUNS, VERBS, RunsDir, bad_input, split_words, the_run
from launcher.config_file import load_config
from launcher.control.find_run import known_record, refuse_links
from launcher.display.status import failure_screen
from launcher.display.summary import Summary, summary_screen
from launcher.display.view import make_display
from launcher.lifecycle.lifecycle import Limits, RunOutcome
from launcher.plan.placement import local_node
from launcher.plan.plan import hub_addresses, plan_run
from launcher.preflight.changed_settings import refuse_changes
from launcher.preflight.preflight import Findings, check_run, link_ports
from launcher.problems import InputError, hint_screen, missing_screen, problem_screen
from launcher.run.interrupts import caught_signals, outliving_readers
from launcher.run.run import PreparedRun
from launcher.run.run import run as carry_out
from launcher.run_dir.run_dir import create_run_dir, run_dir_name, write_inputs
from launcher.settings_tree import Overrides
from launcher.terminal import Screen, accept_any_text, show_error, show_traceback, write_line

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_EXIT_CODES = {"finished": OK, "failed": FAILED, "stopped": INTERRUPTED}
_DEFAULT_VERB = "run"
_DASHED_SETTING = re.compile(r"--?[a-z_]+(\.[a-z_]+)+(=.*)?")
_FIRST_VERBS = ("run", "validate", "init", "resume")


class _FileOrVerb(TyperGroup):
    """Puts `run` before arguments that name a file. Any other bare word is a mistyped verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if (setting := next((word for word in args if _DASHED_SETTING.fullmatch(word)), None)) is not None:
            raise typer.BadParameter(f"{setting} is a setting: write it without dashes, {setting.lstrip('-')}")
        words = [word for word in args if not word.startswith("-")]
        if words and words[0] not in self.commands and ({".", os.sep} & set(words[0]) or Path(words[0]).exists()):
            args = [_DEFAULT_VERB, *args]
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of verbs, with complete sentences."""
        helps = {name: (command.help or "").partition("\n\n")[0] for name, command in self.commands.items()}
        begin = [name for name in _FIRST_VERBS if name in helps]
        with formatter.section("Verbs"):
            rest = [name for name in helps if name not in begin]
            formatter.write_dl([(name, " ".join(helps[name].split())) for name in begin + rest])

    def invoke(self, ctx: Any) -> Any:
        """Carry out the verb. A Ctrl-C that no run catches ends it without a message."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_FileOrVerb,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train a language model with the settings of one YAML file: darts-launch FILE.yaml [NAME=VALUE]...",
)

RunFile = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The cluster and the run.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME=VALUE", help="Settings that replace those of the file: learner.steps=200"),
]
MoreFiles = Annotated[
    list[Path] | None,
    typer.Option("--file", "-f", metavar="MORE.yaml", help="Settings laid over those of the file. May be repeated."),
]


_ALL_VERBS: tuple[Callable[..., None], ...] = (*VERBS, samples, follow, dashboard)
for _verb in _ALL_VERBS:
    app.command()(_verb)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        write_line(f"darts-launch {importlib.metadata.version('darts-async')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    accept_any_text()
    raise_open_files()
    try:
        app(prog_name="darts-launch")
    except Exception as error:  # noqa: BLE001 - the end of the process: a full disk, or a mistake of ours
        if is_no_space(error):
            show_error(str(error))
        else:
            show_traceback(error)
        sys.exit(FAILED)


@app.command(_DEFAULT_VERB)
def run_command(
    file: RunFile,
    words: Words = None,
    more: MoreFiles = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be started, and start nothing.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --dry-run: also commands, environments, ports.")
    ] = False,
) -> None:
    """Run FILE.yaml (the verb may be left out).

    Ctrl-C, SIGTERM and the end of the terminal (SIGHUP) stop the run in order. In a script, make this the last command,
    `exec darts-launch FILE.yaml`: a signal to a shell that waits for the run does not reach the run.
    """
    config, _ = _checked(file, _overrides(words, more), starts=not dry_run)
    if dry_run:
        plan = _plan(config, config.runs_path / run_dir_name(config.name))
        Screen().print(dry_run_screen(config, plan, is_verbose=verbose))
        return
    with outliving_readers(), _room_wanted(), bad_input():
        outcome, summary = _run(config)
        _show_end(outcome, summary)
    raise typer.Exit(_EXIT_CODES[outcome.status])


@app.command()
def resume(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN_DIR|NAME=VALUE", help="The run (default: the newest), and new settings."),
    ] = None,
    more: MoreFiles = None,
    from_checkpoint: Annotated[
        bool, typer.Option("--from-checkpoint", help="Start from the newest checkpoint and discard later progress.")
    ] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Continue a run that was stopped, failed or killed, or train a finished one further: learner.steps=200."""
    with bad_input():
        run_dir, settings = split_words(words or [])
        overrides = _overrides(settings, [file.absolute() for file in more or ()])
        found = the_run(run_dir, runs_dir, is_live=False).absolute()
        refuse_links(found)
        with held(found):
            record = known_record(found)
            if record is not None and Path(record.directory or ".").is_dir():
                os.chdir(record.directory or ".")  # relative paths of the settings begin there
            steps = _loaded(found / CONFIG_FILE, overrides).learner.steps
            past = read_past(found, _known_plan(found), steps=steps)
            config, _ = _checked(found / CONFIG_FILE, overrides, starts=True)
            changes = refuse_changes(found, found / CONFIG_FILE, config, past.num_steps)
            past = replace(past, changes=tuple(map(str, changes)))
            plan = structs.replace(_plan(config, found), life=past.life, from_checkpoint=from_checkpoint)
            renew_run_keys(found / KEYS_DIR, plan.endpoints())
            with outliving_readers(), _room_wanted():
                outcome, summary = asyncio.run(_lead(config, plan, found, past))
                _show_end(outcome, summary)
    raise typer.Exit(_EXIT_CODES[outcome.status])


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL|RUN_DIR", help="A directory, a hub id, or a run.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE.yaml|NAME=VALUE", help="The settings (default: those of the run), and changes."),
    ] = None,
    more: MoreFiles = None,
) -> None:
    """Evaluate a model, or what a run has trained, on the held-out prompts of FILE.yaml. Nothing is trained."""
    named, words = split_words(words or [])
    file = named or Path(model) / CONFIG_FILE
    if named is None and not file.is_file():
        with bad_input():
            raise ConfigError(f"{model} is not a run, so its settings are not known; write FILE.yaml after it")
    config, _ = _checked(file, _overrides(words, more), starts=True, change=lambda config: as_evaluation(config, model))
    with outliving_readers(), _room_wanted(), bad_input():
        outcome, summary = _run(config)
        _show_end(outcome, summary)
    raise typer.Exit(_EXIT_CODES[outcome.status])


@app.command()
def validate(file: RunFile, words: Words = None, more: MoreFiles = None) -> None:
    """Check FILE.yaml and everything it names, try out prompts and reward, and start nothing."""
    config, findings = _checked(file, _overrides(words, more), starts=False)
    title = f"{file} {'is valid' if findings.problems else 'can be run'}"
    Screen().print(validate_screen(title, findings, local_node(config).name))


def _limits(config: RunConfig) -> Limits:
    return Limits(
        finish_s=config.learner.finish_timeout_s,
        save_s=config.learner.stop_timeout_s,
        no_progress_s=config.telemetry.no_progress_timeout_s,
        no_space_s=config.telemetry.no_space_timeout_s,
    )


def _overrides(words: list[str] | None, more: list[Path] | None) -> Overrides:
    return Overrides(tuple(more or ()), tuple(words or ()))


def _checked(
    file: Path,
    overrides: Overrides,
    *,
    starts: bool,
    change: Callable[[RunConfig], RunConfig] = lambda config: config,
) -> tuple[RunConfig, Findings]:
    """The settings of a file, changed, if they can be run, and the findings. Otherwise shows the problems and exits.

    What this machine lacks is a problem if the run `starts`, and otherwise a warning.
    """
    with bad_input():
        parse_faults(os.environ.get(VARIABLE, ""), LAUNCHER)
    config = _loaded(file, overrides)
    with bad_input():
        config = change(config)
    findings = check_run(config, reaches_nodes=starts)
    problems = findings.problems
    refused = tuple(problem for problem in problems if starts or not problem.here)
    if refused:
        _refuse(InputError(file, refused))
    if problems:
        Screen(stderr=True).print(missing_screen(file, problems))
    if findings.hints:
        Screen(stderr=True).print(hint_screen(file, findings.hints))
    if findings.prompts is not None and findings.prompts.num_left_out:
        Screen(stderr=True).print(Text.assemble(("! ", "yellow"), str(findings.prompts)), soft_wrap=True)
    return config, findings


def _loaded(file: Path, overrides: Overrides) -> RunConfig:
    """The settings of a file. Otherwise shows the problems and exits."""
    try:
        return load_config(file, overrides)
    except InputError as error:
        _refuse(error)


def _refuse(error: InputError) -> NoReturn:
    Screen(stderr=True).print(problem_screen(error))
    raise typer.Exit(BAD_INPUT) from error


def _plan(config: RunConfig, run_dir: Path) -> RunPlan:
    return plan_run(config, run_dir, hub_addresses(config, link_ports(config)))


def _known_plan(run_dir: Path) -> RunPlan:
    """The plan of the previous life. If it cannot be read, a plan with the same processes."""
    try:
        return read_plan(run_dir)
    except ConfigError:
        return _plan(load_config(run_dir / CONFIG_FILE), run_dir)


def _run(config: RunConfig) -> tuple[RunOutcome, Summary]:
    try:
        config = with_commits(config)
    except DataError as error:
        raise ConfigError(str(error)) from error
    run_dir = create_run_dir(config)
    plan = _plan(config, run_dir)
    create_run_keys(run_dir / KEYS_DIR, plan.endpoints())
    with held(run_dir):
        return asyncio.run(_lead(config, plan, run_dir, NO_PAST))


async def _lead(config: RunConfig, plan: RunPlan, run_dir: Path, past: Past) -> tuple[RunOutcome, Summary]:
    """A life of the run, and further ones after `TakeUpAgain`. A signal between two of them ends the second."""
    limits = _limits(config)
    with caught_signals(ignored_afterwards=True) as signals:
        while True:
            write_inputs(run_dir, config, plan)
            (run_dir / SUMMARY_FILE).unlink(missing_ok=True)  # of the previous life
            display = make_display(Screen())
            outcome, summary = await _conduct(PreparedRun(config, plan, run_dir, display, limits, signals, past))
            if not outcome.goes_on:
                return outcome, summary
            limits, past = replace(limits, num_lives=limits.num_lives - 1), read_past(run_dir, plan)
            plan = structs.replace(_plan(config, run_dir), life=past.life)


async def _conduct(life: PreparedRun) -> tuple[RunOutcome, Summary]:
    run_dir, display = life.run_dir, life.display
    try:
        return await carry_out(life)
    except TransportError as error:
        display.close()
        _give_up(f"the launcher's own link cannot be opened: {error}")
    except (OSError, ExceptionGroup) as error:
        if (why := _taken_away(error, run_dir)) is None:
            raise
        display.close()
        moved = "if it was moved, `darts-launch resume` of its new place continues the run"
        _give_up(f"the run has ended, for its directory can no longer be used: {why}; {moved}")
    finally:
        display.close()


def _taken_away(error: Exception, run_dir: Path) -> OSError | None:
    """The error, or the first of a group, if all say that files in `run_dir` were removed or changed."""
    if isinstance(error, ExceptionGroup):
        found = [_taken_away(each, run_dir) for each in error.exceptions]
        return found[0] if all(found) else None
    if not isinstance(error, OSError) or is_no_space(error) or not isinstance(error.filename, str):
        return None
    return error if Path(error.filename).is_relative_to(run_dir) else None


def _show_end(outcome: RunOutcome, summary: Summary) -> None:
    Screen().print(summary_screen(summary))
    if outcome.status == "failed":
        Screen(stderr=True).print(failure_screen(outcome, Path(summary.run_dir)))


@contextmanager
def _room_wanted() -> Iterator[None]:
    """Ends with a message if the disk has no space for the first files of a run."""
    try:
        yield
    except (OSError, NoSpaceError) as error:
        if not is_no_space(error):
            raise
        _give_up(f"the run cannot begin: {error}")


def _give_up(message: str) -> NoReturn:
    show_error(message)
    raise typer.Exit(FAILED)
