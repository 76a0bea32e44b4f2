"""The gate: format, lint, types and the rules of the architecture. The same locally and in CI."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from darts_async.topology import run_files
from darts_async.topology.links import LINKS
from darts_async.topology.roles import AGENT, KEEPER, ROLES
from tests import ROOT

STAGES = ("generator", "shaper", "reward", "learner")
SOURCES = sorted(path for folder in ("darts_async", "launcher") for path in (ROOT / folder).rglob("*.py"))


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_code_is_formatted() -> None:
    run("ruff", "format", "--check", ".")


def test_the_code_is_lint_free() -> None:
    run("ruff", "check", ".")


@pytest.mark.slow
def test_the_types_hold() -> None:
    run("mypy")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_never_imports_another_stage(stage: str) -> None:
    others = tuple(f"darts_async.{other}" for other in STAGES if other != stage)
    for path in (ROOT / "darts_async" / stage).rglob("*.py"):
        crossing = [name for name in imports_of(path) if name.startswith(others)]
        assert not crossing, f"{path}: {crossing}"


def test_the_package_never_imports_the_launcher() -> None:
    for path in (ROOT / "darts_async").rglob("*.py"):
        assert not [name for name in imports_of(path) if name.partition(".")[0] == "launcher"], path


def test_nothing_imports_the_quickstart() -> None:
    """It is a user of the package: a run names its task, its reward and its model."""
    for path in SOURCES:
        if path.parent.name != "quickstart":
            assert not [name for name in imports_of(path) if name.startswith("darts_async.quickstart")], path


def test_only_what_calls_an_extension_loads_it() -> None:
    """Loading runs what the user has written: in the process that calls it, and in the child that tries it out."""
    loading = {str(path.relative_to(ROOT)) for path in SOURCES if "darts_async.extensions.load" in imports_of(path)}
    assert loading == {
        "darts_async/generator/process.py",
        "darts_async/learner/losses/kinds.py",
        "darts_async/learner/objective.py",
        "darts_async/prompts/record_sources.py",
        "darts_async/reward/worker.py",
        "darts_async/shaper/rules/custom.py",
        "launcher/preflight/extension_check.py",  # ours alone
        "launcher/preflight/extension_trial.py",
        "launcher/sinks/follower.py",
    }


def test_nothing_pickles() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "multiprocessing"}
    for path in SOURCES:
        assert not {name.partition(".")[0] for name in imports_of(path)} & forbidden, path
        text = path.read_text()
        assert not [word for word in ("send_pyobj", "recv_pyobj", "torch.load(", "torch.save(") if word in text], path


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["shaper.process", "reward.process", "learner.state", "generator.state", "simulation.chaos.run"],
)
def test_shaper_reward_and_all_decisions_need_no_torch(module: str) -> None:
    code = f"import sys, darts_async.{module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


DECIDING = (
    *sorted((ROOT / "darts_async" / "shaper").rglob("*.py")),
    *(ROOT / "darts_async" / "learner" / name for name in ("moves.py", "state.py", "intake.py")),
    *(
        ROOT / "darts_async" / "generator" / f"{name}.py"
        for name in ("state", "probe", "stop_strings", "token_batcher")
    ),
    ROOT / "darts_async" / "weights" / "receiving" / "member.py",
    *(ROOT / "darts_async" / "weights" / "sending" / f"{name}.py" for name in ("coordinator", "membership", "rounds")),
)


def test_what_decides_does_no_io() -> None:
    """Nothing that decides may see a clock, a socket, a task, a log or a source of randomness of its own."""
    forbidden = {"time", "asyncio", "random", "socket", "zmq", "structlog", "threading", "os", "datetime"}
    for path in DECIDING:
        if path.name not in ("process.py", "ledger.py", "journal.py", "rollout_writer.py"):
            assert not {name.partition(".")[0] for name in imports_of(path)} & forbidden, path


NAMES_ELSEWHERE = {
    ("generator/vllm/worker_hub.py", "workers"): "a directory",
    ("shaper/rules/custom.py", "reward"): "a field of a sample",
    ("shaper/token_accounts.py", "rewards"): "a field of a message",
    ("shaper/token_accounts.py", "rewards/"): "what the names of curves begin with",
    ("shaper/token_accounts.py", "weights"): "a field of a message",
    ("simulation/chaos/lies.py", "reward"): "a field of a message",
    ("simulation/chaos/lies.py", "rewards"): "a field of a message",
    ("simulation/chaos/lies.py", "weights"): "a field of a message",
    ("simulation/chaos/plan.py", "generator"): "a section of the settings",
    ("simulation/chaos/plan.py", "learner"): "a section of the settings",
    ("simulation/chaos/plan.py", "reward"): "a section of the settings",
    ("simulation/chaos/plan.py", "weights"): "a section of the settings",
    ("simulation/demand.py", "rewards"): "an array of a trace",
    ("learner/process.py", "learner/"): "what its metrics begin with",
    ("learner/moves.py", "generators"): "what is waited for",
    ("weights/receiving/receive.py", "weights"): "a task",
    ("quickstart/__init__.py", "model"): "no file of a run",
    ("analysis/report.py", "launcher"): "the package",
    ("config/run.py", "reward"): "a section of the settings",
    ("api/run.py", "launcher"): "the package",
    ("commands/dry_run.py", "generator"): "a section of the settings",
    ("commands/dry_run.py", "learner"): "a section of the settings",
    ("commands/dry_run.py", "reward"): "a section of the settings",
    ("commands/dry_run.py", "weights"): "a section of the settings",
    ("display/summary.py", "reward"): "a label",
    ("display/view.py", "generators"): "a label",
    ("display/view.py", "reward"): "a label",
    ("progress/evaluation.py", "rewards"): "a field of a line",
    ("progress/evaluation.py", "rewards/"): "what the names of curves begin with",
    ("progress/metric_names.py", "reward"): "a unit",
    ("sinks/recorder.py", "reward"): "a label",
}
"""Words that are also the name of a role, of a link or of a file of a run, and mean something else here."""


def test_roles_links_and_files_of_a_run_are_named_in_their_tables_alone() -> None:
    named = {role.name for role in (*ROLES, AGENT, KEEPER)} | {link.name for link in LINKS}
    files = {value for name, value in vars(run_files).items() if name.isupper()}
    found = {}
    for path in SOURCES:
        if (where := path.relative_to(ROOT)).parts[1] != "topology":
            found |= {(str(Path(*where.parts[1:])), word): line for word, line in _words(path, named, files)}
    assert not found.keys() - NAMES_ELSEWHERE.keys(), {
        f"{name}:{found[name, word]}: take {word!r} from darts_async.topology"
        for name, word in found.keys() - NAMES_ELSEWHERE.keys()
    }
    assert not NAMES_ELSEWHERE.keys() - found.keys(), "these are gone: take them from the list"


def _words(path: Path, named: set[str], files: set[str]) -> Iterator[tuple[str, int]]:
    """Literals that name a role, a process, a link or a file; the last only with a dot or after a slash."""
    tree = ast.parse(path.read_text())
    after_slash = {id(node.right) for node in ast.walk(tree) if isinstance(node, ast.BinOp)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            role, slash, number = node.value.partition("/")
            is_name = role in named and (not slash or not number or number.isdigit())
            is_file = node.value in files and ("." in node.value or id(node) in after_slash)
            if is_name or is_file:
                yield node.value, node.lineno


def test_no_code_asks_for_the_name_of_an_engine() -> None:
    """What an engine can do is in the table of `config.engines`."""
    for path in SOURCES:
        if path.name != "engines.py":
            compared = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
            words = {word.value for node in compared for word in ast.walk(node) if isinstance(word, ast.Constant)}
            assert not words & {"embedded", "vllm", "scripted"}, path
