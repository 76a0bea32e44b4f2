"""Processes on nodes and devices: every placement keeps the rules, and an impossible one says what is missing."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from darts_async.config import RunConfig
from darts_async.topology.roles import GENERATOR, LEARNER, REWARD, ROLES, SHAPER, Role
from launcher.plan.placement import PlacementError, place_processes, role_config, role_names


def run_config(nodes: dict[str, Any], **roles: dict[str, Any]) -> RunConfig:
    """A run on nodes with these devices. Roles as in the file; the engine is the one that takes devices."""
    hosts = {name: f"10.0.0.{number}" for number, name in enumerate(nodes, start=1)}
    size = max(1, roles.get("generator", {}).get("devices", 0))
    return RunConfig.model_validate(
        {
            "nodes": [{"name": name, "host": hosts[name], "devices": devices} for name, devices in nodes.items()],
            "roles": roles,
            "generator": {"engine": "vllm", "vllm": {"tensor_parallel_size": size}},
        }
    )


def places_of(config: RunConfig, role: Role) -> list[tuple[str, tuple[int, ...]]]:
    places = place_processes(config)
    return [(places[name].node, places[name].devices) for name in role_names(config, role)]


def test_without_nodes_all_is_on_this_machine_without_devices() -> None:
    places = place_processes(RunConfig())
    assert {(place.node, place.host, place.devices) for place in places.values()} == {("local", "127.0.0.1", ())}


def test_devices_are_given_out_from_the_lowest_number_and_the_first_node() -> None:
    config = run_config(
        {"a": 4, "b": 4}, learner={"replicas": 2, "devices": 1}, generator={"replicas": 5, "devices": 1}
    )
    assert places_of(config, LEARNER) == [("a", (0,)), ("a", (1,))]
    assert places_of(config, GENERATOR) == [("a", (2,)), ("a", (3,)), ("b", (0,)), ("b", (1,)), ("b", (2,))]


def test_listed_devices_are_the_ones_given_out() -> None:
    config = run_config({"a": [7, 5, 2]}, learner={"devices": 1}, generator={"devices": 2})
    assert places_of(config, GENERATOR) == [("a", (2, 5))]
    assert places_of(config, LEARNER) == [("a", (7,))]


def test_who_may_be_on_fewer_nodes_chooses_first() -> None:
    config = run_config({"a": 1, "b": 1}, learner={"devices": 1}, generator={"devices": 1, "nodes": ["a"]})
    assert places_of(config, GENERATOR) == [("a", (0,))]
    assert places_of(config, LEARNER) == [("b", (0,))]


def test_who_takes_more_devices_chooses_first_so_that_they_are_neighbours() -> None:
    config = run_config({"a": 8}, learner={"replicas": 3, "devices": 1}, generator={"devices": 4})
    assert places_of(config, GENERATOR) == [("a", (0, 1, 2, 3))]
    assert places_of(config, LEARNER) == [("a", (4,)), ("a", (5,)), ("a", (6,))]


def test_a_process_never_spans_nodes() -> None:
    config = run_config({"a": 3, "b": 2}, generator={"replicas": 2, "devices": 2}, learner={"devices": 1})
    assert places_of(config, GENERATOR) == [("a", (0, 1)), ("b", (0, 1))]
    assert places_of(config, LEARNER) == [("a", (2,))]


def test_processes_without_devices_go_round_their_nodes() -> None:
    config = run_config({"a": 0, "b": 0, "c": 0}, reward={"replicas": 4, "nodes": ["c", "b"]}, shaper={"nodes": ["c"]})
    assert [node for node, _ in places_of(config, REWARD)] == ["b", "c", "b", "c"]
    assert places_of(config, SHAPER) == [("c", ())]


def test_a_device_is_shared_only_when_both_roles_say_so() -> None:
    shares = {"devices": 1, "share_devices": True}
    both = run_config({"a": 1}, learner=shares, generator=shares)
    assert places_of(both, LEARNER) == places_of(both, GENERATOR) == [("a", (0,))]
    for learner, generator in ((shares, {"devices": 1}), ({"devices": 1}, shares)):
        with pytest.raises(PlacementError):
            place_processes(run_config({"a": 1}, learner=learner, generator=generator))


def test_an_unused_device_is_taken_before_one_is_shared() -> None:
    shares = {"devices": 1, "share_devices": True}
    config = run_config({"a": 1, "b": 1}, learner=shares, generator={**shares, "replicas": 2})
    assert places_of(config, LEARNER) == [("a", (0,))]
    assert places_of(config, GENERATOR) == [("b", (0,)), ("a", (0,))]


def test_a_role_never_shares_a_device_with_itself() -> None:
    with pytest.raises(PlacementError):
        place_processes(run_config({"a": 1}, generator={"replicas": 2, "devices": 1, "share_devices": True}))


def test_too_few_devices_are_refused_with_what_is_wanted_and_what_there_is() -> None:
    config = run_config({"a": 8, "b": 3}, generator={"replicas": 3, "devices": 4})
    with pytest.raises(PlacementError) as refusal:
        place_processes(config)
    problem = refusal.value.problem
    assert (problem.place, problem.value) == ("roles.generator.devices", "4")
    assert (
        "no node can take generator/2 of 3: it needs 4 of one node, but a has 0 of 8 free, b has 3 of 3"
        in problem.message
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": [{"name": "a", "devices": [0, 1, 0]}]}, r"device 0 is named twice in \[0, 1, 0\]"),
        ({"nodes": [{"name": "a", "devices": "all"}]}, "devices is 'all'; write how many there are"),
        ({"nodes": [{"name": "a", "devices": -1}]}, "devices is -1"),
        ({"nodes": [{"name": "a", "devices": True}]}, "devices is True"),
        ({"nodes": []}, "list of nodes is empty"),
        (
            {"nodes": [{"name": "a", "host": "::1"}, {"name": "a", "host": "::2"}]},
            "nodes 0 and 1 both have the name 'a'",
        ),
        (
            {"nodes": [{"name": "a", "host": "::1"}, {"name": "b", "host": "::1"}]},
            "'a' and 'b' both have the host '::1'",
        ),
        ({"nodes": [{"name": "a", "host": "::1"}, {"name": "b"}]}, "'b' has no host, but there are 2 nodes"),
        ({"roles": {"reward": {"nodes": ["b"]}}}, "roles.reward.nodes names 'b', but the nodes are local"),
        ({"roles": {"learner": {"devices": 2}}}, "roles.learner.devices is 2, but a rank drives one device"),
        ({"roles": {"generator": {"devices": 1}}}, "roles.generator.devices is 1, but generator.engine embedded"),
        (
            {"roles": {"generator": {"devices": 2}}, "generator": {"engine": "vllm"}},
            "tensor_parallel_size is 1, but roles.generator.devices is 2",
        ),
        (
            {"generator": {"engine": "vllm", "vllm": {"tensor_parallel_size": 2}}},
            "tensor_parallel_size is 2, but roles.generator.devices is 0",
        ),
    ],
)
def test_contradictions_are_refused_with_both_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(settings)


def test_nodes_survive_being_written_and_read() -> None:
    config = run_config({"a": 2, "b": [3, 5]}, learner={"devices": 1, "nodes": ["b"]})
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


roles = st.fixed_dictionaries(
    {"replicas": st.integers(1, 4), "devices": st.integers(0, 3), "share_devices": st.booleans()},
    optional={"nodes": st.lists(st.sampled_from("abc"), min_size=1, unique=True)},
)


@given(st.lists(st.integers(0, 5), min_size=3, max_size=3), roles, roles, roles)
def test_every_placement_keeps_the_rules(
    devices: list[int], learner: dict[str, Any], generator: dict[str, Any], reward: dict[str, Any]
) -> None:
    learner["devices"] = min(learner["devices"], 1)
    nodes = dict(zip("abc", devices, strict=True))
    config = run_config(nodes, learner=learner, generator=generator, reward=reward)
    try:
        places = place_processes(config)
    except PlacementError:
        return
    takers: dict[tuple[str, int], list[Role]] = {}
    for role in ROLES:
        settings = role_config(config, role)
        for name in role_names(config, role):
            place = places[name]
            assert place.node in (settings.nodes or nodes)
            assert len(set(place.devices)) == settings.devices
            assert set(place.devices) <= set(range(nodes[place.node]))
            for device in place.devices:
                takers.setdefault((place.node, device), []).append(role)
    for sharing in takers.values():
        assert len(set(sharing)) == len(sharing)
        assert len(sharing) == 1 or all(role_config(config, role).share_devices for role in sharing)


@given(st.integers(1, 8), st.integers(1, 8))
def test_roles_without_sharing_fit_exactly_when_there_are_enough_devices(num_ranks: int, num_generators: int) -> None:
    config = run_config(
        {"a": 8}, learner={"replicas": num_ranks, "devices": 1}, generator={"replicas": num_generators, "devices": 1}
    )
    try:
        place_processes(config)
        assert num_ranks + num_generators <= 8
    except PlacementError:
        assert num_ranks + num_generators > 8
