"""A run directory that somebody removes, moves or breaks while its run goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from darts_async.errors import NoSpaceError
from launcher.commands.cli import _taken_away
from tests.support.launched import LaunchedRun

pytestmark = pytest.mark.timeout(300)


def test_only_errors_about_files_of_the_run_are_taken_for_its_directory(tmp_path: Path) -> None:
    ours, other = OSError(2, "gone", str(tmp_path / "a")), OSError(2, "gone", "/elsewhere")
    assert _taken_away(ours, tmp_path) is ours
    assert _taken_away(ExceptionGroup("", [ours, ExceptionGroup("", [ours])]), tmp_path) is ours
    mistakes: list[Exception] = [other, OSError(9, "no file"), ValueError("x"), NoSpaceError("full")]
    mistakes += [OSError(28, "full", str(tmp_path / "a")), ExceptionGroup("", [ours, other])]
    for mistake in mistakes:
        assert _taken_away(mistake, tmp_path) is None, "a mistake of ours keeps its traceback"


def remove(run_dir: Path) -> None:
    shutil.rmtree(run_dir, ignore_errors=True)


def move(run_dir: Path) -> None:
    run_dir.rename(run_dir.parent.parent / "moved")


def replace(run_dir: Path) -> None:
    move(run_dir)
    run_dir.mkdir()


def block(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").mkdir()


@pytest.mark.slow
@pytest.mark.parametrize("take", [remove, move, replace, block])
def test_a_run_whose_directory_is_taken_away_ends_with_a_message_and_leaves_no_process(
    tmp_path: Path, take: Callable[[Path], None]
) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", {"learner": {"steps": 100_000}}) as run:
        run.wait_for_steps(2)
        processes = run.processes()
        take(run.run_dir)
        assert run.process.wait(120) == 1
        assert "its directory can no longer be used" in " ".join(run.output.split()), run.output
        assert "Traceback" not in run.output
        if take is replace:
            assert "another directory is in its place" in run.output.replace("\n", " ")
            assert not [path for path in run.run_dir.rglob("*") if path.is_file()], "and nothing is written there"
        assert not any(process.is_running() for process in processes[1:])
