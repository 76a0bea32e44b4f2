"""What the READMEs say is so: every command works, every link and path leads somewhere, every function named is there.

How a command is checked, by what it begins with (`CHECKS`):

    darts-launch FILE of `launcher/configs/`   its dry run. That the quickstart learns is a test of `whole_runs`
    darts-launch VERB                          carried out, on a real run of the scripted engine that goes on meanwhile
    the task of the README                     carried out as it is, and its output compared, but for the numbers
    python -m pytest                           the tests that it names are there. CI runs them all
    python -m ruff, python -m mypy             `test_gate` runs them
    python -m, any other                       its own parser takes exactly these arguments; measuring takes hours
    pip install, python3 -m venv               CI carries them out, or the extra that is named exists

A command that no check is for fails.
"""

import argparse
import ast
import importlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import pytest
import typer
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

import bench.pictures
import launcher.commands.cli
from bench import __main__ as benchmarks
from bench.pictures import Camera, flow_svg, full_plan, screen_svg
from darts_async.config import RunConfig
from darts_async.protocol import ProcessStatus
from darts_async.shaper.group import SAMPLE_LIFE
from darts_async.shaper.window import StalenessWindow
from darts_async.topology.links import LINKS
from darts_async.topology.roles import ROLES
from launcher.config_file import parse_config
from launcher.lifecycle.lifecycle import RUN_LIFE
from launcher.nodes.fleet import NODE_LIFE
from launcher.progress.run_view import RunView
from launcher.progress.step_merger import StepLine
from launcher.settings_tree import Overrides
from tests import ROOT
from tests.support.launched import LaunchedRun

DOOR_LINES = 180
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {part for part in path.relative_to(ROOT).parts[:-1] if part.startswith(".") or part == "runs"}
    and path.parent != ROOT / "bench" / "results"
)
DOOR = ROOT / "README.md"
ARCHITECTURE = ROOT / "darts_async" / "README.md"
OF_A_LIVE_RUN = ("status", "logs", "restart")
OF_A_RUN = ("audit", "story", "trace", "report", "samples", "follow")
ENDS_A_RUN, GOES_ON, SERVES = "down", "resume", "dashboard"
WITHOUT_A_RUN = ("validate", "init", "--dry-run")
EVALUATES = "evaluate"
"""Carried out by `launcher/commands/test_evaluation.py`: it is a run of its own."""
THE_RUN = "cluster.yaml"


class Command(NamedTuple):
    """A command of a page, as words; what stands before it is in `environment`."""

    page: Path
    words: tuple[str, ...]
    environment: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {shlex.join(self.words)}"


def blocks(page: Path, language: str) -> list[str]:
    """What stands in fences of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[Command]:
    """Of all fences of shell but those that write files, and of the text itself where it is marked as code."""
    lines = [line for block in blocks(page, "sh") if "<<" not in block for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`((?:exec )?(?:darts-launch|python -m|pip install) [^`]+)`", prose.replace("\n", " "))
    for line in (*lines, *spans):
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            places = [index for index, word in enumerate(words) if "=" not in word or word.startswith("-")]
            if words and places:
                variables = dict(word.split("=", 1) for word in words[: places[0]])
                shown = tuple(word.removeprefix(".venv/bin/") for word in words[places[0] :] if word != "exec")
                yield Command(page, shown, variables)


COMMANDS = [command for page in PAGES for command in commands(page)]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


# --- commands ------------------------------------------------------------------------------------------------


class _ArgumentsAreRead(Exception):
    """Raised in place of what a program does."""


def arguments_are_read(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own parser takes the arguments. Nothing else of it is carried out."""
    at = command.words.index("-m") + 1
    module, arguments = command.words[at], list(command.words[at + 1 :])
    if module == "bench" and not arguments:
        monkeypatch.setattr(sys, "argv", ["bench"])
        benchmarks.main()
        return
    if module == "bench":
        assert arguments[0] in benchmarks.QUESTIONS, command
        module, arguments = f"bench.{arguments[0]}", arguments[1:]
    file = ROOT / f"{module.replace('.', '/')}.py"
    if "typer.run(main)" in file.read_text():
        program = typer.Typer()
        program.command()(importlib.import_module(module).main)
        assert typer.main.get_command(program).make_context(module, arguments).params
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser) -> NoReturn:
        if "--help" in arguments:
            assert parser.format_help()
        else:
            parse(parser, arguments)
        raise _ArgumentsAreRead

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(_ArgumentsAreRead):
        runpy.run_path(str(file), run_name="__main__")


def the_tests_are_there(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files and folders that are named have tests."""
    named = [word for word in command.words if word.startswith("tests")]
    assert all(list((ROOT / word).rglob("test_*.py")) or (ROOT / word).is_file() for word in named), command


def gate_runs_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one of the commands of `test_gate`, but for `--check`."""
    gate = (ROOT / "tests" / "test_gate.py").read_text().replace(', "--check"', "")
    words = ", ".join(f'"{word}"' for word in command.words[2:])
    assert f"run({words})" in gate, command


def can_be_installed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """CI does the same, or it names extras that exist."""
    line = shlex.join(command.words)
    if line.split("install ")[-1] in (ROOT / ".ci" / "run").read_text():
        return
    [named] = re.findall(r"(?:darts-async|\.)\[([\w,-]+)\]", line) or [""]
    assert line == "pip install ." or set(named.split(",")) <= EXTRAS, command


def is_of_ci(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """CI has an environment of its own too."""
    assert "python3 -m venv" in (ROOT / ".ci" / "run").read_text()


def is_a_valid_plan(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dry run, where no data is needed; `test_configs` has those of the others."""
    for name, value in command.environment.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(launcher.commands.cli.app, ["--dry-run", *command.words[1:]])
    assert result.exit_code == 0, result.stderr


def is_carried_out(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `test_the_verbs_do_what_the_pages_say`."""
    assert command.words[1] in (
        *OF_A_LIVE_RUN,
        *OF_A_RUN,
        ENDS_A_RUN,
        GOES_ON,
        SERVES,
        EVALUATES,
        *WITHOUT_A_RUN,
        THE_RUN,
    ), command
    parse_config("name: x", Path(THE_RUN), Overrides(words=tuple(word for word in command.words if "=" in word)))


CHECKS: dict[str, Callable[[Command, pytest.MonkeyPatch], None]] = {
    "darts-launch launcher/configs/": is_a_valid_plan,
    "darts-launch ": is_carried_out,
    "python -m bench": arguments_are_read,
    "python -m pytest": the_tests_are_there,
    "python -m ruff": gate_runs_it,
    "python -m mypy": gate_runs_it,
    "python -m ": arguments_are_read,
    "python -P -m ": arguments_are_read,
    "python3 -m venv": is_of_ci,
    "pip install": can_be_installed,
}
"""The first that a command begins with."""


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_checked(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    line = " ".join(command.words)
    check = next((check for beginning, check in CHECKS.items() if line.startswith(beginning)), None)
    assert check is not None, f"no check is for {command}"
    monkeypatch.chdir(ROOT)
    check(command, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_verbs_do_what_the_pages_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First those of a live run, then its end, then those of a run that is over, then how it goes on."""
    verbs = list(dict.fromkeys(command.words[1:] for command in COMMANDS if is_a_verb(command)))
    followers = [verb for verb in verbs if "-f" in verb]
    with LaunchedRun(tmp_path, "scripted.yaml", {"learner": {"steps": 1_000_000, "checkpoint_every": 10}}) as run:
        run.wait_for_steps(2)
        monkeypatch.chdir(tmp_path)

        def do(*verb: str) -> None:
            words = [str(run.run_dir) if word == "RUN_DIR" else word for word in verb]
            if verb[0] == "report":  # matplotlib keeps files open
                assert run.verb(*words).returncode == 0, verb
                return
            done = CliRunner().invoke(launcher.commands.cli.app, words)
            assert done.exit_code == 0, (verb, done.stdout, done.stderr)

        followed = [run.begin(*verb) for verb in followers]
        for verb in verbs:
            if verb[0] in OF_A_LIVE_RUN and verb not in followers:
                do(*verb)
                if verb[0] == "restart" and not verb[1].startswith("agent"):
                    run.wait_for_service(verb[1] if "/" in verb[1] else f"{verb[1]}/0", 2)
        for verb in verbs:
            if verb[0] == SERVES:
                serve_and_end(run, *verb)
        do(ENDS_A_RUN)
        assert [follower.wait(60) for follower in followed] == [0] * len(followed), run.output
        assert run.end() == 130, run.output
        for verb in verbs:
            if verb[0] in (*OF_A_RUN, *WITHOUT_A_RUN):
                do(*verb)
                (tmp_path / "new.yaml").unlink(missing_ok=True)
        for verb in verbs:
            if verb[0] == GOES_ON:
                num_steps = len(run.lines("metrics.jsonl"))
                run.resume(*(word for word in verb[1:] if word != "RUN_DIR"))
                run.wait_for_steps(num_steps + 2)
                do(ENDS_A_RUN)
                assert run.end() == 130, run.output


def serve_and_end(run: LaunchedRun, *verb: str) -> None:
    """A verb that stays until Ctrl-C."""
    num_addresses = run.output.count("http://")
    serving = run.begin(*(str(run.run_dir) if word == "RUN_DIR" else word for word in verb))
    run.wait_until(lambda: run.output.count("http://") > num_addresses)
    serving.send_signal(signal.SIGINT)
    assert serving.wait(60) == 0, run.output


def is_a_verb(command: Command) -> bool:
    return command.words[0] == "darts-launch" and not command.words[1].startswith("launcher/configs/")


def task() -> tuple[str, str]:
    """The shell of *your own task*, and the output that is shown for it."""
    [shell] = [block for block in blocks(DOOR, "sh") if "<<" in block]
    [output] = blocks(DOOR, "text")
    return shell, output


def shape(line: str) -> str:
    """A line without its numbers, their number of digits, and bars."""
    return " ".join(re.sub(r"[\d.,:%]+", "#", re.sub("[█▏▎▍▌▋▊▉]", "", line)).split())


def test_a_task_of_ones_own_is_forty_lines() -> None:
    shell, output = task()
    assert len(shell.splitlines()) + len(output.splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_task_of_ones_own_gives_the_output_that_is_shown(tmp_path: Path) -> None:
    shell, output = task()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", shell],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = {shape(line) for line in done.stdout.splitlines()}
    assert [line for line in output.splitlines() if shape(line) not in printed] == []


# --- settings, links, names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_settings_fragment_is_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        RunConfig.model_validate(yaml.safe_load(block))


def is_a_setting(name: str) -> bool:
    """Whether `a.b.c` is a setting, the roles standing for one another."""
    section: type[BaseModel] | None = RunConfig
    for word in name.replace("ROLE", "generator").split("."):
        if section is None or word not in section.model_fields:
            return False
        annotation = section.model_fields[word].annotation
        parts = [annotation, *getattr(annotation, "__args__", ())]
        section = next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_that_is_named_exists(page: Path) -> None:
    sections = "|".join(RunConfig.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.(?!py\b|yaml\b|json|md\b)[\w.]+)[`:]", page.read_text()))
    assert [name for name in sorted(named) if not is_a_setting(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_example_is_python_and_stands_in_a_fence(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)
    assert not re.findall(r"^ {4}(?:python|darts-launch|pip) .*", page.read_text(), re.MULTILINE)


def test_the_example_of_a_test_passes() -> None:
    [block] = blocks(ROOT / "tests" / "README.md", "python")
    names: dict[str, Any] = {"StalenessWindow": StalenessWindow}
    exec(block, names)
    claims = [call for name, call in names.items() if name.startswith("test_")]
    assert len(claims) == 1
    claims[0]()


def targets(page: Path) -> Iterator[str]:
    """Where links and pictures lead, those to the web left out."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in targets(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.relative_to(ROOT)}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.relative_to(ROOT)}: {target}"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"`([\w./-]+/[\w./-]*\.(?:py|yaml|md|svg|json))`", page.read_text())
    roots = (page.parent, ROOT)
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


def test_every_function_on_the_way_to_a_gradient_is_there() -> None:
    rows = re.findall(r"^\| `([\w/.]+\.py)` \| `([\w.]+)` \|", ARCHITECTURE.read_text(), re.MULTILINE)
    assert len(rows) > 20
    assert [row for row in rows if not defines(ARCHITECTURE.parent / row[0], row[1])] == []


def defines(path: Path, name: str) -> bool:
    """Whether a module has a function, or a class with that method, in itself or in a class of the same file."""
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    for word in name.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = next((node for node in body if isinstance(node, kinds) and node.name == word), None)
        if found is None:
            return False
        body = found.body
    return True


def test_the_lives_that_are_shown_are_those_of_the_tables() -> None:
    shown = [block.rstrip("\n") for block in blocks(ARCHITECTURE, "text")]
    assert shown == [life.picture() for life in (SAMPLE_LIFE, RUN_LIFE, NODE_LIFE)]


def test_the_door_is_short_enough_to_be_read() -> None:
    assert len(DOOR.read_text().splitlines()) <= DOOR_LINES


def test_the_door_leads_to_every_page() -> None:
    shown = {(ROOT / target.partition("#")[0]).resolve() for target in targets(DOOR)}
    rooms = {page for page in PAGES if page.name == "README.md" and page.parent.parent == ROOT}
    assert len(rooms) == 4
    assert rooms <= shown


# --- pictures ------------------------------------------------------------------------------------------------


def test_the_picture_of_the_flow_is_that_of_the_links_and_their_messages() -> None:
    """`python -m bench.pictures --only flow` draws it anew."""
    assert (ROOT / "bench" / "results" / "flow.svg").read_text() == flow_svg(full_plan())


def test_the_picture_of_the_flow_has_the_messages_of_every_link_and_says_who_sends_what_to_the_launcher() -> None:
    drawn = re.findall(r">([^<]*)</text>", flow_svg(full_plan()))
    words = set(re.findall(r"\w+", " ".join(drawn)))
    for link in LINKS:
        assert link.name in words
        sent = [*get_args(link.hub_sends), *get_args(link.member_sends)]
        assert not {kind.__name__ for kind in sent} - words, link.name
    assert "and back: PeerRefused, ProcessStatus" in drawn
    for role in ROLES:
        expected = f"from the {role} also: {', '.join(kind.__name__ for kind in role.tells_launcher)}"
        assert (expected in drawn) == bool(role.tells_launcher)


def view_of_a_run() -> RunView:
    view = RunView(full_plan(), name="mine", run_dir="/somewhere/runs/mine-1", total_steps=10, now_s=0.0)
    view.take_status("generator/0", ProcessStatus("decoding", 4, 100, 8, 2.0, {}, 0.0))
    for step in range(4):
        view.take_step(StepLine(step, {"reward/pool_mean": step / 4, "length/pool_mean": 20.0}), float(step))
    return view


def test_the_picture_of_the_live_view_has_what_the_view_has() -> None:
    """`python -m bench.pictures --only live_view` takes it anew."""
    taken = (ROOT / "bench" / "results" / "live_view.svg").read_text()
    drawn = screen_svg(view_of_a_run(), 5.0)
    assert "runs/mine-1" in drawn
    assert "/somewhere" not in drawn
    for picture in (taken, drawn):
        assert "@font-face" not in picture, "a picture must not load anything"
        for word in ("process", "state", "version", "tokens/s", "busy", "restarts", "reward", "length", "generator/0"):
            assert word in picture, word


def test_a_picture_is_taken_once() -> None:
    view, camera = view_of_a_run(), Camera(at_step=4)
    camera.refresh(view, 5.0)
    first = camera.picture
    view.take_step(StepLine(4, {"reward/pool_mean": 1.0}), 6.0)
    camera.refresh(view, 7.0)
    assert camera.picture == first
    assert "4/10" in first


def test_pictures_are_written_where_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--only", "flow"])
    bench.pictures.main()
    assert [path.name for path in tmp_path.iterdir()] == ["flow.svg"]


def test_fences_and_prose_are_both_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        textwrap.dedent(
            """
            Call `exec darts-launch a.yaml`, not `python`.

            ```sh
            X="1, 2" .venv/bin/darts-launch b.yaml && pip install 'c[d]'   # and why
            ```
            """
        )
    )
    found = list(commands(page))
    assert [command.words for command in found] == [
        ("darts-launch", "b.yaml"),
        ("pip", "install", "c[d]"),
        ("darts-launch", "a.yaml"),
    ]
    assert found[0].environment == {"X": "1, 2"}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_example_of_a_run_from_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = [block for block in blocks(ROOT / "launcher" / "README.md", "python") if "launcher.api" in block]
    (tmp_path / "launcher").symlink_to(ROOT / "launcher")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["result"].status == "finished"
    assert len(names["result"].steps) == 5
