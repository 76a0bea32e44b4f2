"""What others have written cannot command a terminal, nor hide; and no terminal is too plain for a verb."""

import ast
import errno
import io
import json
import os
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

import launcher.commands.cli
from darts_async.config import RunConfig
from darts_async.protocol import ProcessStatus
from darts_async.topology.plan import encode_plan
from launcher.commands.cli import app
from launcher.display.status import failure_screen
from launcher.display.view import PlainDisplay, run_screen
from launcher.lifecycle.lifecycle import RunOutcome
from launcher.plan.plan import link_addresses, plan_run
from launcher.preflight.preflight import Findings
from launcher.progress.run_view import RunView
from launcher.run_dir.logs import LogTail
from launcher.run_dir.run_dir import RunRecord, write_record
from launcher.terminal import Screen, printable, write_json
from tests import ROOT
from tests.support.launched import LaunchedRun

HOSTILE = "a\x1b[31mb\x1b]0;title\x07c\x9b2Jd\u202ee\u200bf\u2066g\r\x08\x7fh[red]i[/red]"
SHOWN = "a\\u001b[31mb\\u001b]0;title\\u0007c\\u009b2Jd\\u202ee\\u200bf\\u2066g\\u000d\\u0008\\u007fh[red]i[/red]"


def is_safe(text: str) -> bool:
    return all(character.isprintable() or character in "\n\t \xa0" for character in text)


def screen(renderable: object, width: int = 200) -> str:
    output = io.StringIO()
    console = Screen(file=output)
    console.width = width
    console.print(renderable)
    return output.getvalue()


def test_controls_directions_and_zero_width_are_shown_as_escapes() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("naïve 日本語 👍 a\tb\nc") == "naïve 日本語 👍 a\tb\nc"
    assert printable("\ud800") == "\\ud800", "no encoding takes it"
    assert printable("\U000e0041") == "\\udb40\\udc41", "as JSON writes it"


@given(st.text())
def test_what_is_printable_stays_and_nothing_else_is_left(text: str) -> None:
    once = printable(text)
    assert printable(once) == once
    once.encode()
    assert not any(ord(each) < 32 or 127 <= ord(each) < 160 for each in once if each not in "\n\t")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_is_the_same_value_in_ascii(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        output = io.StringIO()
        patch.setattr("sys.stdout", output)
        write_json(msgspec.json.encode({"text": text}))
    assert output.getvalue().isascii()
    assert json.loads(output.getvalue()) == {"text": text}


def test_a_screen_draws_no_control_and_reads_no_markup_wherever_text_comes_from() -> None:
    table = Table()
    table.add_column("[b]column[/b]")
    table.add_row(HOSTILE)
    for renderable in (HOSTILE, Text(HOSTILE), Text.assemble(("x", "red"), HOSTILE), table):
        drawn = screen(renderable)
        assert "h[red]i[/red]" in drawn
        assert is_safe(drawn), repr(drawn)
    assert "[b]column[/b]" in screen(table)


def test_the_failure_screen_and_logs_show_hostile_lines_as_text(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    log = {"level": "error", "event": HOSTILE, "error": "first\nlearner/0  a line of another process"}
    (tmp_path / "logs" / "learner-0.jsonl").write_text(json.dumps(log) + "\n")
    (tmp_path / "logs" / "learner-0.out").write_text(HOSTILE + "\n")
    drawn = screen(failure_screen(RunOutcome("failed", HOSTILE, "learner/0"), tmp_path))
    assert is_safe(drawn), repr(drawn)
    assert SHOWN in drawn
    lines = LogTail(tmp_path / "logs" / "learner-0.jsonl", "shaper/0").skip_to_last(9)
    assert all(line.startswith("shaper/0  ") and is_safe(line) for line in lines), lines
    assert len(lines) > 1, "a further line of a message has the label too"


def hostile_view() -> RunView:
    plan = plan_run(RunConfig(), Path("/runs/a"), link_addresses("127.0.0.1", range(7000, 7006)))
    view = RunView(plan, name=HOSTILE, run_dir="/runs/[red]", total_steps=10, now_s=0.0)
    view.note(f"{HOSTILE} is lost")
    view.take_status("learner/0", ProcessStatus(HOSTILE, 0, 0, 0, 1.0, {}, 0.0))
    view.take_exit("reward/0", HOSTILE, left_cleanly=False)
    return view


def test_notices_and_states_are_text(tmp_path: Path) -> None:
    assert is_safe(drawn := screen(run_screen(hostile_view(), 1.0), 300)), repr(drawn)
    assert f"{SHOWN} is lost" in drawn
    assert "/runs/[red]" in drawn
    output = io.StringIO()
    PlainDisplay(Screen(file=output)).note(HOSTILE)
    assert output.getvalue() == SHOWN + "\n"


def test_a_verb_shows_hostile_records_as_text(tmp_path: Path) -> None:
    plan = plan_run(RunConfig(), tmp_path, link_addresses("127.0.0.1", range(7000, 7006)))
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "plan.json").write_bytes(encode_plan(plan))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "shaper-0.out").write_text(HOSTILE + "\n")
    write_record(tmp_path, RunRecord("failed", HOSTILE, 0.0, 1.0, 1))
    for words in (["status"], ["status", "--json"], ["logs", "shaper"]):
        verb, *options = words
        done = CliRunner().invoke(app, [verb, *options[:1], str(tmp_path), *options[1:]])
        assert done.exit_code == 0, done.output
        assert is_safe(done.output), repr(done.output)
        assert "\\u001b[31m" in done.output


def test_the_log_of_the_launcher_is_shown_too(tmp_path: Path) -> None:
    plan = plan_run(RunConfig(), tmp_path, link_addresses("127.0.0.1", range(7000, 7006)))
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "plan.json").write_bytes(encode_plan(plan))
    (tmp_path / "logs").mkdir()
    write_record(tmp_path, RunRecord("failed", "", 0.0, 1.0, 1))
    (tmp_path / "logs" / "launcher.jsonl").write_text('{"event": "connection_refused"}\n')
    (tmp_path / "logs" / "keeper-local.out").write_text("words\n")
    for name, words in (("launcher", "connection_refused"), ("keeper/local", "words")):
        done = CliRunner().invoke(app, ["logs", name, str(tmp_path)])
        assert done.output == f"{name}  {words}\n"


def test_a_traceback_of_the_launcher_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise RuntimeError(HOSTILE)

    output = io.StringIO()
    monkeypatch.setattr(launcher.commands.cli, "app", fails)
    monkeypatch.setattr("sys.stderr", output)
    with pytest.raises(SystemExit) as ended:
        launcher.commands.cli.main()
    assert ended.value.code == 1
    assert f"RuntimeError: {SHOWN}" in output.getvalue()
    assert is_safe(output.getvalue())


def test_a_full_disk_at_the_other_end_of_a_verb_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(launcher.commands.cli, "app", fails)
    with pytest.raises(SystemExit) as ended:
        launcher.commands.cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "✗ [Errno 28] No space left on device\n"


@pytest.mark.parametrize("moment", ["load_config", "create_run_dir"])
def test_ctrl_c_where_no_run_catches_it_is_an_interruption(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text("name: a\n")
    monkeypatch.setattr(launcher.commands.cli, "check_run", lambda *_, **__: Findings((), (), None))
    monkeypatch.setattr(launcher.commands.cli, moment, interrupted)
    done = CliRunner().invoke(launcher.commands.cli.app, ["cluster.yaml"])
    assert (done.exit_code, done.output) == (130, "")


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return dotted | called


def test_nothing_else_writes_to_a_terminal() -> None:
    """Those that say a line of JSON to the launcher, over a pipe; interrupts wrap the streams."""
    talkers = {"terminal.py", "detached.py", "interrupts.py", "model_trial.py", "node_inspection.py", "follower.py"}
    for path in sorted((ROOT / "launcher").rglob("*.py")):
        if path.name not in talkers:
            assert not names_in(path) & {"sys.stdout", "sys.stderr", "Console", "print", "typer.echo"}, path


PLAIN = ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"})
"""Environments in which a terminal knows ASCII alone."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_verb_speaks_to_a_terminal_that_knows_ascii_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PLAIN[0].items():
        monkeypatch.setenv(name, value)
    with LaunchedRun(tmp_path, "scripted.yaml", {"learner": {"steps": 2}}) as run:
        assert run.end() == 0, run.output
        assert run.output.isascii()
        assert "+ scripted finished" in run.output
        there, file = str(run.run_dir), str(tmp_path / "cluster.yaml")
        verbs = {
            "run": [file, "--dry-run"],
            "validate": [file],
            "resume": [there],
            "status": [there],
            "restart": ["reward", there],
            "down": [there],
            "logs": ["shaper", there],
            "audit": [there],
            "story": [there, "0"],
            "trace": [there],
            "report": [there],
            "samples": [there],
            "follow": [there],
            "dashboard": [str(tmp_path / "temporary")],  # where there is no run: otherwise it would stay
            "init": [str(tmp_path / "new.yaml")],
            "evaluate": [there, str(tmp_path / "no.yaml")],
        }
        assert set(verbs) == {command.name or command.callback.__name__ for command in app.registered_commands}
        mistakes = ("resume", "restart", "down", "follow", "dashboard", "evaluate")
        for verb, words in verbs.items():
            assert_plain(run.verb(verb, *words), 2 if verb in mistakes else 0)
        monkeypatch.delenv("PYTHONIOENCODING")
        for name, value in PLAIN[1].items():
            monkeypatch.setenv(name, value)
        for verb in ("run", "status", "resume"):
            assert_plain(run.verb(verb, *verbs[verb]), 2 if verb in mistakes else 0)


def assert_plain(done: subprocess.CompletedProcess[str], code: int) -> None:
    said = done.stdout + done.stderr
    assert said, done.args
    assert said.isascii(), said
    assert "Traceback" not in said, said
    assert done.returncode == code, said
