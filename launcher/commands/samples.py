"""The verb `samples`: rollouts of a run on the terminal."""

import re
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from darts_async.errors import ConfigError
from launcher.analysis.rollouts import Order, Query, RunRollouts
from launcher.commands.verbs import RUNS, AnyRun, RunsDir, bad_input, the_run
from launcher.display.rollouts import rollouts_screen
from launcher.terminal import Screen, write_json


def samples(
    run_dir: AnyRun = None,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="Which step, counted from 0. Default: the newest.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The highest rewards first.")] = False,
    worst: Annotated[bool, typer.Option("--worst", help="The lowest rewards first.")] = False,
    cancelled: Annotated[bool, typer.Option("--cancelled", help="Only cancelled samples.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Only samples whose reward failed.")] = False,
    prompt_id: Annotated[int | None, typer.Option("--prompt", metavar="ID", help="Only samples of a prompt.")] = None,
    grep: Annotated[str | None, typer.Option("--grep", metavar="RE", help="Only responses with this in them.")] = None,
    evaluations: Annotated[
        bool, typer.Option("--evaluations", help="Held-out samples; --step is the version that was evaluated.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Show at most so many.")] = 8,
    full: Annotated[bool, typer.Option("--full", help="Show long texts as a whole.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line, with everything.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Show samples of a run: prompt, response, reward and what became of them.

    A filter (--cancelled, --failed, --prompt, --grep) looks through all steps, the newest first, unless --step is
    given.
    """
    with bad_input():
        pattern = _pattern(grep)
        query = Query(
            kind="held-out" if evaluations else "train",
            number=step,
            prompt_id=prompt_id,
            pattern=pattern,
            cancelled=cancelled,
            failed=failed,
            order=_order(best=best, worst=worst),
            limit=limit + 1,  # so that it is known whether there are more
        )
        reader = RunRollouts(the_run(run_dir, runs_dir, is_live=False))
        found = reader.find(query)
    for name, reason in reader.damaged.items():
        Screen(stderr=True).print(Text.assemble(("! ", "yellow"), f"{name} is left out: {reason}"), soft_wrap=True)
    if as_json:
        for rollout in found[:limit]:
            write_json(msgspec.json.encode(rollout))
    elif found:
        Screen().print(rollouts_screen(found[:limit], pattern=pattern, is_full=full))
        if len(found) > limit:
            Screen().print(Text(f"there are more: -n {2 * limit} shows twice as many", style="dim"))
    else:
        Screen().print(Text("no sample that was kept is like this", style="dim"))


def _order(*, best: bool, worst: bool) -> Order:
    if best and worst:
        raise ConfigError("--best and --worst are both given; give one of them")
    return "best" if best else "worst" if worst else "launch"


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ConfigError(f"--grep {text!r} is not a regular expression: {error}") from error
