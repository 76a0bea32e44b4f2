"""Nothing of vLLM outlives what it belongs to, and who is left learns of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from launcher.nodes.scratch import Scratch
from tests.generator.vllm.world import needs_vllm, tiny_model

pytestmark = [needs_vllm, pytest.mark.slow]

PATIENCE_S = 120.0


@contextmanager
def decoding(model_dir: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A process that decodes with vLLM, and its engine core."""
    tiny_model().save_pretrained(model_dir)
    command = [sys.executable, "-m", "tests.fakes.vllm_process", str(model_dir)]
    scratch = Scratch.make(str(model_dir))  # as the supervisor of a run gives each process one
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("core "):
                yield process, psutil.Process(int(line.split()[1]))
                return
        pytest.fail(f"the process ended with {process.wait(PATIENCE_S)} before it decoded")
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdout.close()
        assert list(scratch.path.iterdir()), "or it is needed no more"
        scratch.remove()


def test_the_engine_core_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    with decoding(tmp_path) as (process, core):
        children = [core, *core.children(recursive=True)]
        process.kill()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_engine_core_dies_every_call_says_so_and_the_process_can_end(
    tmp_path: Path, blow: signal.Signals
) -> None:
    with decoding(tmp_path) as (process, core):
        core.send_signal(blow)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
        assert not core.is_running()
    lines = [line for line in output.splitlines() if line.startswith(("step", "call", "pause", "closed", "SIGTERM"))]
    assert [line.split()[0] for line in lines] == ["step:", "call:", "pause:", "step:", "closed"]
    assert all("vLLM's engine core" in line for line in lines[:-1])
