"""The verb `dashboard`: a page about runs, live and over."""

import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from launcher.commands.verbs import RUNS, bad_input
from launcher.dashboard.runs import ShownRuns
from launcher.dashboard.server import DashboardServer
from launcher.terminal import write_line


def dashboard(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|RUNS_DIR", help="A run, or a directory of runs to show side by side.")
    ] = RUNS,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on. 0: any free one.")] = 0,
) -> None:
    """Show runs in a browser: charts, samples, processes, evaluations, events.

    It reads the run directory and asks the launcher, so it may be started and ended at any time. It listens on this
    machine only, and only the address that it prints is answered.
    """
    with bad_input():
        server = DashboardServer(ShownRuns.at(path), port)
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        write_line(f"{server.url}  (Ctrl-C ends it)")
        server.serve_forever()
    except KeyboardInterrupt:
        pass  # the only way in which it ends
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.close()


def _interrupt(*_: object) -> NoReturn:
    """Also where Python would not: a shell starts its background jobs with SIGINT ignored."""
    raise KeyboardInterrupt
