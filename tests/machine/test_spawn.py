"""How processes are started: one way for all, bound to the parent before anything is imported, with a safe path."""

import ast
import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from darts_async.config import RunConfig
from darts_async.machine.spawn import FIRST_MODULE, module_command, spawn
from darts_async.protocol import SampleScored, Score
from darts_async.reward.worker_messages import FunctionSpec
from darts_async.reward.worker_pool import RewardPool
from launcher.preflight.extension_check import check_extensions
from tests import ROOT
from tests.support.byte_tokenizer import write_tokenizer
from tests.support.launched import LaunchedRun
from tests.test_gate import SOURCES, imports_of

STARTERS = {
    "darts_async/machine/spawn.py": {"create_subprocess_exec"},
    "launcher/nodes/exec_with_env.py": {"execvpe"},  # becomes a command that `module_command` has made
    "launcher/nodes/detached.py": {"fork"},  # the keeper that outlives its ssh session
    "darts_async/machine/fork_server.py": {"fork"},  # processes of a node that have imported everything
    "darts_async/reward/warden.py": {"fork"},  # its worker, before anything heavy is imported
    "darts_async/machine/trial_process.py": {"Popen"},  # looks at models or a module of the user's, or makes tasks
    "launcher/plan/devices.py": {"run"},  # nvidia-smi, with a deadline
    "launcher/api/run.py": {"Popen"},  # the launcher, for a caller in Python
    "darts_async/reward/sandbox/program.py": {"Popen"},  # a program of a response, in its sandbox
    "darts_async/reward/sandbox/confine.py": {"execv", "fork"},  # becomes that program, once it is confined
    "darts_async/reward/sandbox/probe.py": {"fork"},  # tries whether the bound of processes holds
    "darts_async/reward/sandbox/directory.py": {"run"},  # removes what is nested too deeply for a function
    "darts_async/reward/sandbox/isolation.py": {"run"},  # asks the program's Python where its files are
}
"""The files that may start a process, and with what. vLLM forks its own: see `process_tree`."""
_OF_MODULES = {
    "subprocess": {"run", "Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput"},
    "asyncio": {"create_subprocess_exec", "create_subprocess_shell"},
    "os": {name for name in dir(os) if name.startswith(("exec", "fork", "spawn", "posix_spawn", "popen", "system"))},
    "pty": {"fork", "spawn"},
}
_OF_LOOPS = {"subprocess_exec", "subprocess_shell"}
_SLOW_IMPORT = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"


def starts_of(path: Path) -> Iterator[str]:
    """What a file starts processes with."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in _OF_MODULES.get(node.value.id, _OF_LOOPS):
                yield node.attr
        elif isinstance(node, ast.Import):
            yield from (f"{alias.name} as {alias.asname}" for alias in node.names if _is_renamed(alias))
        elif isinstance(node, ast.ImportFrom) and node.module in _OF_MODULES:
            yield from (alias.name for alias in node.names if alias.name in _OF_MODULES[node.module])


def _is_renamed(alias: ast.alias) -> bool:
    return alias.name in _OF_MODULES and alias.asname is not None


def test_one_module_starts_processes_and_the_exceptions_are_known() -> None:
    found = {str(path.relative_to(ROOT)): set(starts_of(path)) for path in SOURCES}
    assert {name: starts for name, starts in found.items() if starts} == STARTERS


def test_one_module_makes_command_lines_of_python() -> None:
    for path in SOURCES:
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert path.name in ("spawn.py", "isolation.py") or not constants & {"-m", "-c"}, path


@pytest.mark.parametrize("module", [f"{FIRST_MODULE}", "launcher.__main__"])
def test_what_comes_first_imports_nothing_that_takes_time(module: str) -> None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    later = {"launcher.commands.cli", "launcher.commands.cli.main"} if module == "launcher.__main__" else set()
    assert not {name.partition(".")[0] for name in imports_of(path) - later} - sys.stdlib_module_names


PARENT = """
import asyncio, subprocess, sys
from darts_async.machine.spawn import module_command, spawn
async def main():
    await (await spawn(module_command("slow_import"), stdout=None)).wait()
asyncio.run(main())
"""


@pytest.mark.slow
def test_a_process_that_is_still_importing_dies_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "slow_import.py").write_text(_SLOW_IMPORT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        importing = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([importing], timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
def test_a_process_whose_parent_went_before_it_could_ask_dies_before_it_imports(tmp_path: Path) -> None:
    (tmp_path / "slow_import.py").write_text(_SLOW_IMPORT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "DARTS_PARENT_PID": str(1 << 22)}
    ended = subprocess.run(module_command("slow_import"), env=environment, capture_output=True, check=False, timeout=30)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"")


MODULES = (
    *(f"darts_async.{role}.process" for role in ("shaper", "generator", "learner", "reward")),
    "darts_async.reward.warden",
    "launcher.nodes.keeper",
    "launcher.nodes.agent",
    "launcher.preflight.node_inspection",
    "launcher.nodes.exec_with_env",
    "launcher.preflight.model_trial",
    "launcher.preflight.extension_trial",
    "launcher.sinks.follower",
    "darts_async.reward.sandbox.confine",
    "darts_async.reward.sandbox.probe",
    "darts_async.machine.fork_server",
    "darts_async.models.gguf_import",
    "darts_async.prompts.task_maker",
)
"""All that is started as a process."""


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
async def test_no_process_executes_what_lies_in_the_directory_of_the_caller(tmp_path: Path, module: str) -> None:
    for name in ("structlog", "types", "launcher", "darts_async", "typer", "msgspec", "numpy", "json"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('of the caller')\n")
    output = tmp_path / "output"
    with output.open("wb") as file:  # without its arguments it says how it is used; those that ask on stdin find none
        process = await spawn(
            module_command(module),
            env={"TMPDIR": str(tmp_path)},
            cwd=str(tmp_path),
            stdout=file,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(60):
            code = await process.wait()
    said = output.read_text()
    assert code != 0
    assert "of the caller" not in said
    assert any(word in said for word in ("usage:", "Input data was truncated", "JSON", "IndexError")), said


SHADOWS = ("structlog", "types", "darts_async", "msgspec", "numpy", "uvloop", "torch", "asyncssh")
USERS = "import numpy\ndef reward(**item): return float(numpy.float32(0.5))\n"


def shadow(directory: Path) -> None:
    """What may lie where a user works: files with the names of modules that we import."""
    for name in SHADOWS:
        (directory / f"{name}.py").write_text(f"raise RuntimeError('{name} of the caller')\n")
    (directory / "user_reward.py").write_text(USERS)


@pytest.mark.slow
async def test_a_reward_worker_finds_the_modules_of_the_user_and_no_other_files_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow(tmp_path)
    monkeypatch.chdir(tmp_path)
    pool = RewardPool((FunctionSpec("user_reward:reward"),), write_tokenizer(tmp_path), num_workers=1, deadline_s=20.0)
    await pool.start()
    scored = await pool.score(Score(1, "", "", "{}", np.array([], np.int32), "stop"))
    await pool.close()
    assert isinstance(scored, SampleScored)
    assert scored.reward == 0.5


def test_the_launcher_looks_at_a_module_of_the_user_and_keeps_its_own_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "another_reward.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    config = RunConfig.model_validate({"reward": {"function": "another_reward:reward"}})
    assert not any(found.problems for found in check_extensions(config))
    assert sys.path == before


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_does_not_notice_what_lies_where_it_is_started(tmp_path: Path) -> None:
    shadow(tmp_path)
    settings = {"learner": {"steps": 2}, "reward": {"function": "user_reward:reward"}}
    with LaunchedRun(tmp_path, "scripted.yaml", settings) as run:
        assert run.end() == 0, run.output
        run.assert_clean()


def test_every_module_that_is_a_process_is_tested() -> None:
    entered = {path for path in SOURCES if 'if __name__ == "__main__":' in path.read_text()}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in entered}
    assert names - {"launcher.__main__", FIRST_MODULE} == set(MODULES)
