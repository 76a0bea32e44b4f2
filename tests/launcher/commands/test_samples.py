"""`darts-launch samples`: what it shows, and that bad input is said with exit code 2."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner, Result

from darts_async.rollouts import groups_of
from darts_async.topology.run_files import SAMPLES_DIR
from launcher.commands.cli import app
from launcher.display.rollouts import MAX_CHARS, excerpt, rollouts_screen
from launcher.terminal import Screen
from tests.launcher.analysis.test_rollouts import write
from tests.test_rollouts import rollout


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("name: made\n")
    write(
        tmp_path,
        [
            rollout("7/0", text="the right answer", reward=1.0, advantage=0.5, length=12, answer="42"),
            rollout("7/1", text="clear \x1b[2J me", outcome="cancelled", why="survivor", length=900),
            rollout("7/2", text="", outcome="filtered", why="reward_raised", oldest_version=2, newest_version=3),
        ],
    )
    return tmp_path


def samples(*words: str) -> Result:
    return CliRunner().invoke(app, ["samples", *words])


def test_a_sample_is_shown_with_what_became_of_it(run_dir: Path) -> None:
    result = samples(str(run_dir))
    assert result.exit_code == 0, result.output
    for part in ("group 7", "answer 42", "reward 1.000", "advantage +0.500", "the right answer", "(survivor)"):
        assert part in result.output
    assert "filtered (reward_raised)  0 tokens  versions 2 to 3" in result.output
    assert "(no text)" in result.output
    assert "\\u001b[2J" in result.output
    assert "\x1b" not in result.output


def test_one_is_asked_for_and_as_json_has_every_field(run_dir: Path) -> None:
    [line] = samples(str(run_dir), "--cancelled", "--json").output.splitlines()
    assert json.loads(line)["text"] == "clear \x1b[2J me"
    assert json.loads(line)["length"] == 900
    assert len(samples(str(run_dir), "--json", "-n", "2").output.splitlines()) == 2


def test_samples_that_are_not_shown_are_said_to_be_there(run_dir: Path) -> None:
    result = samples(str(run_dir), "-n", "2")
    assert "7/1" in result.output
    assert "7/2" not in result.output
    assert result.output.splitlines()[-1] == "there are more: -n 4 shows twice as many"
    assert "there are more" not in samples(str(run_dir), "-n", "3").output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "9"], "no samples of step 9; there are those of 3"),
        (["--grep", "("], r"--grep '(' is not a regular expression: missing )"),
        (["--evaluations"], "no samples of an evaluation: no evaluation is complete yet, or telemetry.sample_groups"),
        (["--best", "--worst"], "--best and --worst are both given"),
        (["--step", "-1"], "--step"),
        (["--limit", "0"], "--limit"),
        (["--prompt", "x"], "--prompt"),
    ],
)
def test_bad_input_is_said_with_exit_code_2(run_dir: Path, words: list[str], said: str) -> None:
    result = samples(str(run_dir), *words)
    assert result.exit_code == 2, result.output
    assert said in result.stderr


def test_a_place_without_a_run_or_without_samples_is_said_with_exit_code_2(tmp_path: Path) -> None:
    assert "is not a run directory" in samples(str(tmp_path)).stderr
    (tmp_path / "config.yaml").write_text("name: made\n")
    result = samples(str(tmp_path))
    assert result.exit_code == 2
    assert "has no samples of a step: no step is complete yet, or telemetry.sample_groups is 0" in result.stderr


def test_a_damaged_file_is_named_and_the_others_are_shown(run_dir: Path) -> None:
    (run_dir / SAMPLES_DIR / "train-000004.jsonl.gz").write_bytes(b"no gzip")
    result = samples(str(run_dir), "--prompt", "1")
    assert result.exit_code == 0
    assert "train-000004.jsonl.gz is left out: " in result.stderr
    assert "the right answer" in result.output


def test_nothing_that_is_like_this_is_no_error(run_dir: Path) -> None:
    result = samples(str(run_dir), "--grep", "no such words")
    assert (result.exit_code, result.output.strip()) == (0, "no sample that was kept is like this")


@pytest.mark.parametrize("width", [40, 60, 140])
def test_it_fits_into_a_terminal_of_any_width(width: int) -> None:
    some = [rollout("7/0", text="漢字 and words " * 300, prompt="q " * 200, reward=-1.5), rollout("8/0", text="a\nb")]
    console = Screen(file=(file := open_text()))
    console.width = width
    console.print(rollouts_screen(some))
    shown = file.getvalue()
    assert all(cell_len(row) <= width for row in shown.splitlines())
    assert len(groups_of(some)) == shown.count("group ")
    assert "characters …" in shown


def open_text() -> io.StringIO:
    return io.StringIO()


def test_an_excerpt_has_both_ends_or_what_was_looked_for() -> None:
    text = "begin " + "x" * 5000 + " NEEDLE " + "y" * 5000 + " end"
    shown = excerpt(text, MAX_CHARS)
    assert shown.startswith("begin ")
    assert shown.endswith(" end")
    assert len(shown) < MAX_CHARS + 40
    found = excerpt(text, MAX_CHARS, re.compile("NEEDLE"))
    assert "NEEDLE" in found
    assert len(found) <= MAX_CHARS + 4
    assert excerpt(text, MAX_CHARS, re.compile("nothing")) == shown
    assert excerpt("short", MAX_CHARS) == "short"


def test_what_is_looked_for_is_marked() -> None:
    console = Console(file=open_text(), force_terminal=True, width=80, color_system="standard")
    console.print(rollouts_screen([rollout(text="a needle here")], pattern=re.compile("needle")))
    assert "\x1b[7mneedle\x1b[0m" in console.file.getvalue()  # type: ignore[attr-defined]
