"""Copies of the directory of a live run: they are runs of their own, and nothing reaches the original through them."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from darts_async.topology.run_files import NODES_DIR
from launcher.nodes.node_record import NodeRecord, find_process, read_node_record, write_node_record
from launcher.nodes.scratch import owner_of
from launcher.nodes.supervisor import ProcessRecord, start_time_s
from launcher.run_dir.place import inode_of
from tests.support.kept import detached, keep, prepared
from tests.support.launched import LaunchedRun

SLEEPS = ("python3", "-c", "import time; print(1, flush=True); time.sleep(600)")


@contextmanager
def serving(run_dir: Path) -> Iterator[ProcessRecord]:
    """A process whose arguments name a run directory."""
    argv = (*SLEEPS, "--run-dir", str(run_dir))
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield ProcessRecord("reward/0", process.pid, start_time_s(process.pid), argv)
        process.kill()


@pytest.mark.slow
def test_a_process_is_found_by_what_it_serves_and_not_by_its_pid_and_start_alone(tmp_path: Path) -> None:
    original, copy, link = tmp_path / "a", tmp_path / "b", tmp_path / "link"
    original.mkdir()
    copy.mkdir()
    link.symlink_to(original)
    with serving(original) as record:
        found = find_process(original, record)
        assert found is not None
        assert found.pid == record.pid
        assert find_process(link, record) is not None, "the same directory"
        assert find_process(copy, record) is None
        original.rename(tmp_path / "away")
        assert find_process(copy, record) is None
    assert find_process(original, record) is None
    me = ProcessRecord("reward/0", os.getpid(), start_time_s(os.getpid()), ())
    assert find_process(original, me) is None, "it serves no run"


@pytest.mark.slow
def test_a_record_that_came_with_a_copy_is_none_also_where_the_copy_takes_the_place_of_the_original(
    tmp_path: Path,
) -> None:
    original, copy = tmp_path / "a", tmp_path / "b"
    (original / NODES_DIR).mkdir(parents=True)
    owner = owner_of(original, "local")
    with serving(original) as record:
        write_node_record(original, "local", NodeRecord(1, inode_of(original), record))
        assert read_node_record(original, "local") is not None
        subprocess.run(["cp", "-a", original, copy], check=True)
        assert read_node_record(copy, "local") is None
        original.rename(tmp_path / "away")
        copy.rename(original)
        assert find_process(original, record) is not None, "by its arguments"
        assert read_node_record(original, "local") is None
        assert owner_of(original, "local") != owner, "whose temporary files are in use"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_keeper_in_the_background_of_the_original_is_neither_taken_for_that_of_a_copy_nor_killed(
    tmp_path: Path,
) -> None:
    """As over ssh: the keeper goes on by itself, and the next one is started by the same command."""
    original, copy = prepared(tmp_path), tmp_path / "copy"
    try:
        first = detached(original)["pid"]
        subprocess.run(["cp", "-a", original, copy], check=True)
        assert detached(original) == {"alive": first}
        second = detached(copy)["pid"]
        assert second != first
        keep(copy, "--kill")
        assert not is_running(second)
        detached(copy, life=2)
        assert is_running(first)
    finally:
        for run_dir in (original, copy):
            keep(run_dir, "--kill")
    assert not is_running(first)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@contextmanager
def frozen(run: LaunchedRun) -> Iterator[list[psutil.Process]]:
    """All processes of a run stand still, so that what lies on the disk is of one moment."""
    node = json.loads((run.run_dir / "nodes" / "local.json").read_text())
    pids = [run.process.pid, node["keeper"]["pid"], node["agent"]["pid"], *(e["pid"] for e in run.events("started"))]
    processes = [psutil.Process(pid) for pid in pids]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield processes
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_copy_of_a_live_run_goes_on_by_itself_and_the_original_does_not_notice(tmp_path: Path) -> None:
    settings = {"learner": {"steps": 100_000, "checkpoint_every": 5}, "telemetry": {"status_every_s": 0.1}}
    with LaunchedRun(tmp_path, "scripted.yaml", settings) as run:
        run.wait_for_steps(7)
        copy = tmp_path / "copy"
        with frozen(run) as processes:
            subprocess.run(["cp", "-a", run.run_dir, copy], check=True)
        with_settings(copy, steps=12)
        resumed = run.verb("resume", str(copy))
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        assert all(process.is_running() for process in processes), "of the original"
        run.wait_for_steps(len(run.lines("metrics.jsonl")) + 3)
        assert run.events("ended") == []
        assert run.verb("down", str(run.run_dir)).returncode == 0
        assert run.end() == 130, run.output
        assert len(run.events("node_up")) == 1
        run.assert_clean()
        audit = run.verb("audit", str(copy))
        assert audit.returncode == 0, audit.stdout
        assert json.loads((copy / "summary.json").read_text())["num_steps"] == 12


def with_settings(run_dir: Path, steps: int) -> None:
    """The copy is to end soon."""
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("steps: 100000", f"steps: {steps}"))
