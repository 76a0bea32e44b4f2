"""Limits of the system: raised where they may be, and named before a run that they would break."""

import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from darts_async.config import RunConfig
from darts_async.machine.spawn import MAX_OPEN_FILES, raise_open_files
from launcher.config_file import load_config
from launcher.plan.placement import place_processes
from launcher.preflight.preflight import check_run
from launcher.preflight.system_limits import Limits, Need, check_limits, limits_here, need_of, weight_bytes
from launcher.problems import Problem
from tests.support.launched import CONFIGS, LaunchedRun

NEED = Need(open_files=500, threads=200, address_space_bytes=4 << 30, shm_bytes=64 << 20)
ENOUGH = Limits(open_files=500, threads=1000, threads_now=800, address_space_bytes=4 << 30, shm_bytes=64 << 20)


def needed(config: RunConfig) -> Need:
    return need_of(config, place_processes(config), config.nodes[0].name, weight_bytes(config))


def found(need: Need, limits: Limits) -> list[Problem]:
    return list(check_limits(need, limits, "gpu-1"))


def test_limits_that_are_just_enough_are_no_problem() -> None:
    assert found(NEED, ENOUGH) == []
    assert found(NEED, Limits(None, None, 0, None, 64 << 20)) == [], "no limit"


@pytest.mark.parametrize(
    ("limit", "value", "message", "fix"),
    [
        ("open_files", 499, "may have 499 open files on gpu-1, and this plan needs 500", "`ulimit -Hn 500`"),
        ("threads_now", 801, "has 801 now, and this plan needs 200 more", "`ulimit -Hu 1001`"),
        (
            "address_space_bytes",
            3 << 30,
            "3145728 KiB of address space on gpu-1, and this plan needs 4194304 KiB",
            "`ulimit -v 4194304`",
        ),
        ("shm_bytes", 63 << 20, "/dev/shm has 63 MiB free on gpu-1, and this plan needs 64 MiB", "size=64M"),
        ("shm_bytes", None, "/dev/shm has 0 MiB free", "--shm-size=64m"),
    ],
)
def test_a_limit_that_is_too_low_is_named_with_the_number_and_the_command(
    limit: str, value: int | None, message: str, fix: str
) -> None:
    [problem] = found(NEED, msgspec.structs.replace(ENOUGH, **{limit: value}))
    assert message in problem.message
    assert fix in (problem.fix or "")
    assert problem.here, "another machine could run the file"


def test_what_has_gpus_needs_all_the_address_space_there_is() -> None:
    [problem] = found(msgspec.structs.replace(NEED, address_space_bytes=None), ENOUGH)
    assert "needs no limit" in problem.message
    assert "`ulimit -v unlimited`" in (problem.fix or "")


def test_what_is_needed_grows_with_the_plan() -> None:
    small = needed(RunConfig())
    large = needed(RunConfig.model_validate({"roles": {"generator": {"replicas": 200}}, "reward": {"workers": 100}}))
    assert large.open_files > 1024 > small.open_files
    assert large.threads > 200 * 40 > small.threads
    assert small.shm_bytes == 0, "nothing of ours uses it"


def test_a_plan_that_uses_nccl_and_vllm_needs_shared_memory() -> None:
    roles = {"generator": {"devices": 1, "replicas": 2}, "learner": {"devices": 1}}
    config = RunConfig.model_validate(
        {
            "nodes": [{"name": "a", "devices": 3}],
            "roles": roles,
            "weights": {"backend": "nccl"},
            "generator": {"engine": "vllm"},
        }
    )
    need = needed(config)
    assert need.address_space_bytes is None
    assert need.shm_bytes == (3 * 32 + 2 * 64) << 20


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft // 2, hard))
        raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, MAX_OPEN_FILES), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_this_machine_holds_what_the_quickstart_needs() -> None:
    assert found(needed(RunConfig()), limits_here()) == []


@pytest.mark.slow
def test_limits_are_those_of_the_shell_that_starts_the_run() -> None:
    code = "from launcher.preflight.system_limits import limits_here; print(limits_here())"
    command = f"ulimit -n 100; ulimit -v 3000000; exec {sys.executable} -c '{code}'"
    printed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "open_files=100," in printed
    assert "address_space_bytes=3072000000," in printed


def test_a_limit_is_found_before_a_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = RunConfig.model_validate({"runs_dir": str(tmp_path), "prompts": {"num_train": 8, "held_out": 2}})
    monkeypatch.setattr(
        "launcher.preflight.preflight.limits_here", lambda: msgspec.structs.replace(limits_here(), open_files=100)
    )
    [problem] = check_run(config).problems
    assert f"this plan needs {needed(config).open_files}" in problem.message


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_works_with_just_the_limits_that_are_asked_for(tmp_path: Path) -> None:
    sections = {"learner": {"steps": 6, "groups_per_step": 2, "checkpoint_every": 2}}
    need = needed(load_config(CONFIGS / "scripted.yaml"))
    assert need.address_space_bytes is not None
    limits = f'ulimit -n {need.open_files}; ulimit -v {need.address_space_bytes // 1024}; exec "$@"'
    with LaunchedRun(tmp_path, "scripted.yaml", sections, prefix=("bash", "-c", limits, "limited")) as run:
        assert run.end() == 0, run.output
        run.assert_clean()
