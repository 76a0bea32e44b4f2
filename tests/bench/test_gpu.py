"""The check for GPUs, as far as it goes without one."""

import subprocess
import sys

import pytest
import torch

from tests import ROOT


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = (sys.executable, "-m", "bench.gpu", *arguments)
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=150)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run it")
def test_without_a_gpu_it_says_so_and_ends_well() -> None:
    ended = run()
    assert ended.returncode == 0, ended.stderr
    assert "no GPU here" in ended.stdout


@pytest.mark.slow
def test_the_same_check_passes_on_cpus() -> None:
    ended = run("--backend", "gloo", "--megabytes", "8")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("GB/s") == 3
    assert ended.stderr.count("is whole") == 3
    assert "after the learner left" in ended.stderr
