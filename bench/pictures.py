"""The two pictures of the README: who says what to whom, and a run on the screen.

    python -m bench.pictures [--out bench/results] [--only flow]

`flow.svg` is drawn from the plan of a run and the unions of its links, so a role or a message that is added is in it.
`live_view.svg` is what a terminal shows in the middle of a real run of the quickstart, which takes about a minute.
"""

import argparse
import asyncio
import copy
import io
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final, get_args

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from bench.measured import ROOT
from darts_async.config import RunConfig
from darts_async.topology.links import AGENTS_LINK, WORKERS_LINK, link_named
from darts_async.topology.plan import LinkPlan, RunPlan
from darts_async.topology.roles import LAUNCHER, ROLES
from darts_async.topology.run_files import KEYS_DIR
from darts_async.transport import create_run_keys
from launcher.config_file import load_config
from launcher.display.view import Display, run_screen
from launcher.lifecycle.lifecycle import Limits
from launcher.plan.plan import hub_addresses, link_hubs, plan_run
from launcher.preflight.preflight import link_ports
from launcher.progress.run_view import RunView
from launcher.run.interrupts import caught_signals
from launcher.run.run import PreparedRun, run
from launcher.run_dir.run_dir import create_run_dir, write_inputs

QUICKSTART: Final = ROOT / "launcher" / "configs" / "quickstart.yaml"
SHOWN_AT_STEP: Final = 60
COLUMN: Final = 330
"""Pixels; a message of 20 letters fits on either side of an arrow."""
LINE: Final = 17
FONT: Final = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
INK, PALE, ROLE_FILL, WEIGHTS_INK = "#1f2328", "#57606a", "#ddf4ff", "#8250df"


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="directory for the pictures")
    parser.add_argument("--only", choices=("flow", "live_view"), help="one of them; both without it")
    arguments = parser.parse_args()
    if arguments.only != "live_view":
        (arguments.out / "flow.svg").write_text(flow_svg(full_plan()))
    if arguments.only != "flow":
        with tempfile.TemporaryDirectory() as home:
            picture = asyncio.run(watched(load_config(QUICKSTART), Path(home)))
        (arguments.out / "live_view.svg").write_text(picture)
    print(f"written to {arguments.out}", file=sys.stderr)


# --- the flow ------------------------------------------------------------------------------------------------


def full_plan() -> RunPlan:
    """The plan of a run that has every link, and two processes of every role that may have several."""
    config = load_config(QUICKSTART)
    several = {role: getattr(config.roles, role).model_copy(update={"replicas": 2}) for role in ("reward", "learner")}
    config = config.model_copy(update={"roles": config.roles.model_copy(update=several)})
    return plan_run(config, Path("RUN_DIR"), hub_addresses(config, range(len(link_hubs(config)))))


def messages_of(link: str) -> tuple[list[str], list[str]]:
    """The names of the messages that the hub of a link sends, and of those that its members send."""
    found = link_named(link)
    return _names(found.hub_sends), _names(found.member_sends)


def flow_svg(plan: RunPlan) -> str:
    """Roles as boxes, links as arrows with their messages: what the hub sends on the left, what it hears on the right.

    The role that is the hub of most links is on top, and the other ends of its links are below it, side by side. Links
    between these are drawn below, one to a row. Then comes that of a generator's workers. Those of the launcher, which
    end at every process, are at the bottom.
    """
    links = [link for link in plan.links if link.name != AGENTS_LINK.name and link.hub != LAUNCHER]
    hubs = [_role(link.hub) for link in links]
    top = max(hubs, key=hubs.count)
    spokes = [link for link in links if _role(link.hub) == top]
    columns = {_role(link.members[0]): index for index, link in enumerate(spokes)}
    width = COLUMN * len(spokes)
    rows = max(len(names) for link in spokes for names in messages_of(link.name))
    below = 150 + rows * LINE
    body = [_box(20, 50, width - 40, 40, top), *_prompts(width)]
    for index, link in enumerate(spokes):
        body += _spoke(link, index * COLUMN + COLUMN // 2, 90, below)
        body.append(_box(index * COLUMN + 20, below, COLUMN - 40, 40, _title(plan, _role(link.members[0]))))
    ends = [_lower(body, link, columns, below + 40) for link in links if _role(link.hub) != top]
    height = _launcher(body, plan, width, _workers(body, width, max(ends, default=below + 40)))
    return _document(width, height + 16, body)


def _spoke(link: LinkPlan, x: int, top: int, bottom: int) -> Iterator[str]:
    sent, received = messages_of(link.name)
    yield _line(x - 9, top, x - 9, bottom)
    yield _line(x + 9, bottom, x + 9, top)
    middle = (top + bottom) // 2
    yield from _list(sent, x - 18, middle, "end")
    yield from _list(received, x + 18, middle, "start")
    yield _text(x + 18, bottom - 8, f"link {link.name}", colour=PALE, size=11)


def _lower(body: list[str], link: LinkPlan, columns: dict[str, int], y: int) -> int:
    """A link between two of the lower roles, with a rail, or between the processes of one; returns where it ends."""
    hub, member = _role(link.hub), _role(link.members[0])
    sent, received = messages_of(link.name)
    rail, first = y + 34, y + 64
    left, right = columns[hub] * COLUMN, (columns[hub] + 1) * COLUMN
    others = "the other ranks"
    if hub != member:
        others = f"every {member}"
        start, end = (columns[role] * COLUMN + COLUMN // 2 for role in (hub, member))
        left, right = sorted((start, end))
        right = min(right, columns[hub] * COLUMN) if start > end else right
        path = f"M{start},{y} V{rail} H{end} V{y + 2}"
        line = f'fill="none" stroke="{WEIGHTS_INK}" stroke-width="5" marker-end="url(#thick)"'
        body.append(f'<path d="{path}" {line}/>')
        label = "the weights themselves: torch.distributed broadcast, in flight"
        body.append(_text((start + end) // 2, rail - 9, label, "middle", WEIGHTS_INK))
    letters = (right - left - 40) // 7
    lines = _wrapped([f"{link.hub} to {others}", *sent], letters) + _wrapped(["and back", *received], letters)
    body += [_text(left + 22, first + index * LINE, line, size=11) for index, line in enumerate(lines)]
    last = first + LINE * len(lines)
    body.append(_text(left + 22, last, f"link {link.name}", colour=PALE, size=11))
    return last + 16


def _workers(body: list[str], width: int, y: int) -> int:
    """The link that a generator makes by itself, for its engine's own processes; returns where it ends."""
    sent, received = messages_of(WORKERS_LINK.name)
    to_workers = _wrapped(["a generator with vLLM to each of its workers", *sent], width // 8)
    lines = to_workers + _wrapped(["and back", *received], width // 8)
    body += [_text(42, y + 20 + index * LINE, line, size=11) for index, line in enumerate(lines)]
    last = y + 20 + LINE * len(lines)
    body.append(_text(42, last, f"link {WORKERS_LINK.name}", colour=PALE, size=11))
    return last + 16


def _launcher(body: list[str], plan: RunPlan, width: int, y: int) -> int:
    """The box of the launcher, under everything, with what it says to every process and hears of it."""
    sent, received = messages_of(LAUNCHER)
    of_some = {role.name: _names(role.tells_launcher) for role in ROLES if role.tells_launcher}
    of_every = [name for name in received if not any(name in names for names in of_some.values())]
    lines = _wrapped([f"to every process, over the link {LAUNCHER}", *sent], width // 8) + _wrapped(
        ["and back", *of_every], width // 8
    )
    for role, names in of_some.items():
        lines += _wrapped([f"from the {role} also", *names], width // 8)
    agents = next(link for link in plan.links if link.name == AGENTS_LINK.name)
    lines.append(f"Over the link {agents.name} it has the agent of every node start, watch and end the processes.")
    height = 44 + LINE * len(lines)
    body.append(_box(20, y, width - 40, 34, "darts-launch"))
    body += [_text(42, y + 54 + index * LINE, line, size=11) for index, line in enumerate(lines)]
    return y + height


def _prompts(width: int) -> Iterator[str]:
    yield _text(width // 2, 18, "prompts", "middle", weight="bold")
    yield _line(width // 2, 24, width // 2, 50)


def _title(plan: RunPlan, role: str) -> str:
    """Processes that have a link among themselves are ranks of one whole."""
    are_ranks = any({_role(link.hub), *map(_role, link.members)} == {role} for link in plan.links)
    return f"{role}, N ranks" if are_ranks else f"{role} x N"


def _names(union: Any) -> list[str]:
    """Of the classes of a union, or of a tuple."""
    return [kind.__name__ for kind in (union if isinstance(union, tuple) else get_args(union) or (union,))]


def _role(process: str) -> str:
    return process.partition("/")[0]


def _wrapped(words: Sequence[str], columns: int) -> list[str]:
    """The first word, a colon and the others, in lines of so many letters; lines after the first are indented."""
    lines = [f"{words[0]}:"]
    for word in words[1:]:
        comma = "," if word is not words[-1] else ""
        if len(lines[-1]) + len(word) + 2 > columns:
            lines.append("   ")
        lines[-1] += f" {word}{comma}"
    return lines


def _list(words: Sequence[str], x: int, middle: int, anchor: str, size: int = 12) -> list[str]:
    first = middle - LINE * (len(words) - 1) // 2
    return [_text(x, first + index * LINE, word, anchor, size=size) for index, word in enumerate(words)]


def _box(x: int, y: int, width: int, height: int, title: str) -> str:
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{ROLE_FILL}" stroke="{INK}"/>'
    return shape + (
        _text(x + width // 2, y + height // 2 + 5, title, "middle", weight="bold", size=15) if title else ""
    )


def _line(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.5" marker-end="url(#thin)"/>'


def _text(
    x: int, y: int, words: str, anchor: str = "start", colour: str = INK, *, size: int = 12, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}" font-size="{size}" font-weight="{weight}"'
        f' xml:space="preserve">{escape(words)}</text>'
    )


def _document(width: int, height: int, body: Sequence[str]) -> str:
    markers = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="{size}" markerHeight="{size}"'
        f' orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{colour}"/></marker>'
        for name, size, colour in (("thin", 7, INK), ("thick", 3, WEIGHTS_INK))
    )
    lines = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="{FONT}">',
        f"<defs>{markers}</defs>",
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
        *body,
        "</svg>\n",
    )
    return "\n".join(lines)


# --- the live view -------------------------------------------------------------------------------------------


class Camera(Display):
    """A display that keeps one picture: of the first refresh at which so many steps are done, or of the last one."""

    def __init__(self, at_step: int = SHOWN_AT_STEP) -> None:
        self._at_step = at_step
        self.picture = ""
        self._is_taken = False

    def refresh(self, view: RunView, now_s: float) -> None:
        """Take the picture, unless it is taken."""
        if not self._is_taken:
            self.picture = screen_svg(view, now_s)
            self._is_taken = view.num_steps >= self._at_step


def screen_svg(view: RunView, now_s: float) -> str:
    """The live view at that time, as a terminal of 92 columns shows it."""
    console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    shown = copy.copy(view)
    shown.run_dir = f"runs/{Path(view.run_dir).name}"
    console.print(run_screen(shown, now_s))
    local_fonts = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="darts-launch", code_format=local_fonts, unique_id="live-view")


async def watched(config: RunConfig, home: Path) -> str:
    """Carry a run out in this directory; returns its picture."""
    config = config.model_copy(update={"runs_dir": str(home)})
    run_dir = create_run_dir(config)
    plan = plan_run(config, run_dir, hub_addresses(config, link_ports(config)))
    create_run_keys(run_dir / KEYS_DIR, plan.endpoints())
    write_inputs(run_dir, config, plan)
    camera = Camera()
    with caught_signals() as signals:
        await run(PreparedRun(config, plan, run_dir, camera, Limits(), signals))
    return camera.picture


if __name__ == "__main__":
    main()
