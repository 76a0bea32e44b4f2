"""What a plan says of ranks, devices and addresses."""

from pathlib import Path
from typing import Any

import pytest

from darts_async.config import RunConfig
from darts_async.topology.plan import RunPlan, decode_plan, encode_plan
from launcher.plan.plan import hub_addresses, link_hubs, plan_run, reports_per_step

GPU = {"devices": 1}
TWO_NODES = [{"name": "a", "host": "10.0.0.1", "devices": 2}, {"name": "b", "host": "10.0.0.2", "devices": 3}]


def plan(settings: dict[str, Any], first_port: int = 7000) -> RunPlan:
    config = RunConfig.model_validate(settings)
    ports = range(first_port, first_port + len(link_hubs(config)))
    return plan_run(config, Path("/runs/a"), hub_addresses(config, ports))


def variables(plan: RunPlan, key: str) -> dict[str, str | None]:
    return {spec.name: spec.env.get(key) for spec in plan.processes}


def test_ranks_of_the_learner_know_their_place_among_themselves() -> None:
    ranks = plan({"roles": {"learner": {"replicas": 3}}})
    found = [(spec.env["RANK"], spec.env["LOCAL_RANK"], spec.env["WORLD_SIZE"]) for spec in ranks.processes[1:4]]
    assert found == [("0", "0", "3"), ("1", "1", "3"), ("2", "2", "3")]
    assert variables(ranks, "RANK")["generator/0"] is None


def test_the_local_rank_counts_within_a_node() -> None:
    ranks = plan({"nodes": TWO_NODES, "roles": {"learner": {"replicas": 5, **GPU}}})
    assert [spec.env["LOCAL_RANK"] for spec in ranks.processes if spec.role == "learner"] == ["0", "1", "0", "1", "2"]


def test_ranks_meet_over_a_link_of_their_own_and_only_the_first_is_on_the_others() -> None:
    ranks = plan({"roles": {"learner": {"replicas": 3}, "generator": {"replicas": 2}}})
    link = ranks.link("ranks")
    assert (link.hub, link.members, link.address) == ("learner/0", ("learner/1", "learner/2"), "tcp://127.0.0.1:7006")
    assert ranks.link("learner").members == ("learner/0",)
    assert ranks.link("weights").members == ("generator/0", "generator/1")
    assert {"learner/0", "learner/1", "learner/2"} < set(ranks.link("launcher").members)
    assert {"learner/1", "learner/2"} < set(ranks.endpoints())
    assert reports_per_step() == {"shaper/0": 1, "learner/0": 2}


def test_one_rank_needs_no_link_among_ranks() -> None:
    assert [link.name for link in plan({}).links] == [
        "generators",
        "rewards",
        "learner",
        "weights",
        "launcher",
        "agents",
    ]


def test_a_process_sees_its_own_devices_alone() -> None:
    settings = {
        "nodes": [{"name": "a", "devices": [2, 3, 5]}],
        "roles": {"learner": GPU, "generator": {"devices": 2}},
        "generator": {"engine": "vllm", "vllm": {"tensor_parallel_size": 2}},
    }
    placed = plan(settings)
    assert variables(placed, "CUDA_VISIBLE_DEVICES") == {
        "shaper/0": "",
        "learner/0": "5",
        "reward/0": "",
        "generator/0": "2,3",
    }
    assert set(variables(placed, "CUDA_DEVICE_ORDER").values()) == {"PCI_BUS_ID"}
    assert placed.process("generator/0").devices == (2, 3)


def test_a_run_without_devices_leaves_the_variable_alone() -> None:
    assert set(variables(plan({}), "CUDA_VISIBLE_DEVICES").values()) == {None}


def test_a_link_is_bound_at_the_host_of_its_hub() -> None:
    settings = {"nodes": TWO_NODES, "roles": {"learner": {"nodes": ["b"], "replicas": 2}, "shaper": {"nodes": ["b"]}}}
    placed = plan(settings)
    assert {link.name: link.address for link in placed.links} == {
        "generators": "tcp://10.0.0.2:7000",
        "rewards": "tcp://10.0.0.2:7001",
        "learner": "tcp://10.0.0.2:7002",
        "weights": "tcp://10.0.0.2:7003",
        "launcher": "tcp://10.0.0.1:7004",
        "agents": "tcp://10.0.0.1:7005",
        "ranks": "tcp://10.0.0.2:7006",
    }
    assert (placed.process("learner/1").node, placed.process("learner/1").host) == ("b", "10.0.0.2")


def test_a_node_without_a_host_has_that_of_the_network() -> None:
    placed = plan({"network": {"host": "::1"}, "nodes": [{"name": "a"}]})
    assert {link.address.rpartition(":")[0] for link in placed.links} == {"tcp://[::1]"}
    assert {spec.host for spec in placed.processes} == {"::1"}


def test_a_plan_with_nodes_survives_being_written_and_read() -> None:
    placed = plan({"nodes": TWO_NODES, "roles": {"learner": {"replicas": 4, **GPU}}})
    assert decode_plan(encode_plan(placed)) == placed


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_same_settings_give_the_same_plan(replicas: int) -> None:
    settings = {"nodes": TWO_NODES, "roles": {"learner": {"replicas": replicas, **GPU}}}
    assert plan(settings) == plan(settings)
