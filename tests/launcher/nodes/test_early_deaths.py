"""A keeper or an agent that dies at once: that is said at once, with its last words."""

import stat
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import launcher.commands.cli
from darts_async.topology.run_files import NODES_DIR
from launcher.nodes.keeper import AGENT_TRIES, Keeper
from launcher.nodes.supervisor import Supervisor
from launcher.run_dir.logs import last_lines
from tests.support.kept import keep, prepared

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]  # a node that says nothing is waited for as long


@pytest.fixture
def broken_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an agent imports, and a keeper does not, cannot be imported."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "uvloop.py").write_text("raise ImportError('the wheel does not fit this machine')\n")
    monkeypatch.setenv("PYTHONPATH", str(modules))


def test_a_keeper_that_dies_at_once_fails_the_run_at_once_with_its_last_words(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'the libraries are of another world' >&2\nexit 3\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    file = tmp_path / "broken.yaml"
    nodes = [{"name": "here", "python": str(python)}]
    file.write_text(yaml.safe_dump({"name": "broken", "runs_dir": str(tmp_path / "runs"), "nodes": nodes}))
    result = CliRunner().invoke(launcher.commands.cli.app, [str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "the run failed: its keeper has ended with exit code 3" in result.output
    assert "the libraries are of another world" in result.output


@pytest.mark.usefixtures("broken_agent")
def test_an_agent_that_dies_at_once_fails_the_run_with_its_last_words(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump({"name": "broken", "runs_dir": str(tmp_path / "runs")}))
    result = CliRunner().invoke(launcher.commands.cli.app, [str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "the run failed: its keeper has ended with exit code 1" in result.output
    assert f"its agent ended {AGENT_TRIES} times before it gave a sign of life" in result.output
    assert "the wheel does not fit this machine" in result.output


@pytest.mark.usefixtures("broken_agent")
async def test_a_keeper_gives_up_where_no_agent_ever_lives(tmp_path: Path) -> None:
    run_dir = prepared(tmp_path)
    (run_dir / NODES_DIR).mkdir()
    async with Supervisor(run_dir / "logs", "test") as supervisor:
        keeper = Keeper(run_dir, "local", life=1, lease_s=1000.0, supervisor=supervisor)
        await keeper.keep()
    assert keeper.failure is not None
    assert "the wheel does not fit this machine" in keeper.failure
    lines = last_lines(run_dir / "logs", "agent/local", 1000)
    assert sum(line.startswith("ImportError:") for line in lines) == AGENT_TRIES


@pytest.mark.usefixtures("broken_agent")
def test_a_keeper_in_the_background_that_dies_at_once_says_so_where_it_was_started(tmp_path: Path) -> None:
    """Over ssh that is the one chance."""
    done = keep(prepared(tmp_path), "--detach", "50", "--lease-s", "1000")
    assert done.returncode == 1
    assert "its keeper has ended at once" in done.stderr
    assert "the wheel does not fit this machine" in done.stderr
