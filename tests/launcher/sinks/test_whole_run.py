"""A run with sinks, one of which is killed and one of which always fails, and with a page for Prometheus; and the verb
`follow` while it is live."""

import signal
import socket
import urllib.request
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher.sinks.follower import read_memory
from tests.support.launched import DEADLINE_S, LaunchedRun

COLLECTS, REFUSES = "tests.launcher.sinks.fakes:Collects", "tests.launcher.sinks.fakes:Refuses"


def follower_of(run: LaunchedRun, sink: str) -> int | None:
    """The pid of the present follower of a sink."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[-2:] == [str(run.run_dir), sink] and "launcher.sinks.follower" in words:
            return int(process.pid)
    return None


def num_taken(run: LaunchedRun, sink: str) -> int:
    """Lines that a sink has taken."""
    return read_memory(run.run_dir, sink).num_lines


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_does_not_mind_what_its_sinks_do_and_they_get_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    sinks = ["tensorboard", "wandb", COLLECTS, REFUSES]
    telemetry = {"sinks": sinks, "wandb": {"mode": "offline"}, "prometheus_port": port}
    with LaunchedRun(tmp_path, "scripted.yaml", {"learner": {"steps": 1_000_000}, "telemetry": telemetry}) as run:
        run.wait_for_steps(3)
        first = scraped(port)
        run.wait_until(lambda: follower_of(run, "tensorboard") is not None)
        pid = follower_of(run, "tensorboard")
        assert pid is not None
        psutil.Process(pid).kill()
        run.wait_until(lambda: follower_of(run, "tensorboard") not in (None, pid))
        follow = "follow", str(run.run_dir), "--sink", "trackio"
        interrupted = run.begin(*follow)
        run.wait_until(lambda: num_taken(run, "trackio") > 0)
        interrupted.send_signal(signal.SIGINT)
        assert interrupted.wait(DEADLINE_S) == 130
        followed = run.begin(*follow)
        refused = run.verb("follow", str(run.run_dir), "--sink", "tensorboard")
        run.wait_until(lambda: scraped(port)["darts_run_completed_steps"] > first["darts_run_completed_steps"])
        assert run.verb("down").returncode == 0
        assert followed.wait(DEADLINE_S) == 0, run.output
        assert run.end() == 130, run.output
        run.assert_clean()
        lines = run.lines("metrics.jsonl")
        assert run.lines("collected.jsonl") == lines
        assert {num_taken(run, sink) for sink in ("tensorboard", "wandb", "trackio")} == {len(lines)}
        later = run.verb("follow", str(run.run_dir), "--sink", COLLECTS)
        output = run.output
    assert first["darts_reward_pool_mean"] >= 0
    assert refused.returncode == 2
    assert "already followed for the sink 'tensorboard' by another process" in refused.stderr
    assert "the sink tensorboard has failed and is started again: its follower was killed (SIGKILL)" in output
    assert f"the sink {REFUSES} has failed and is started again: ConnectionError: no server" in output
    assert later.returncode == 0
    assert f"{COLLECTS} has {len(lines)} lines of metrics.jsonl" in later.stdout
