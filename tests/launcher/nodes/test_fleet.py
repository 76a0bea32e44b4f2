"""What the launcher makes of what its nodes report: every process that was ordered ends once, whatever is lost."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from darts_async.config import RunConfig
from launcher.nodes.fleet import (
    COMES_UP_WITHIN_S,
    Ended,
    Fleet,
    Launch,
    NodeCame,
    NodeFailed,
    NodeLost,
    NodeSilent,
    NotStarted,
    Started,
    Step,
    Tell,
)
from launcher.nodes.node_messages import (
    EndNode,
    KillProcess,
    NodeStatus,
    Order,
    ProcessLeft,
    ProcessStarted,
    Report,
    StartProcess,
    StopProcess,
)
from launcher.nodes.supervisor import ProcessExit, ProcessRecord
from launcher.plan.plan import link_addresses, plan_run

LOST_AFTER_S = 10.0
TWO_NODES = RunConfig.model_validate(
    {
        "nodes": [{"name": "a", "host": "10.0.0.1"}, {"name": "b", "host": "10.0.0.2"}],
        "roles": {"shaper": {"nodes": ["a"]}, "learner": {"nodes": ["a"]}, "reward": {"nodes": ["a"]}}
        | {"generator": {"nodes": ["b"], "replicas": 2}},
    }
)
PLAN = plan_run(TWO_NODES, Path("/runs/a"), link_addresses("10.0.0.1", range(7000, 7006)))
KEEPER = ProcessRecord("keeper/b", 100, 1.0, ())


def new_fleet() -> Fleet:
    return Fleet(PLAN, lost_after_s=LOST_AFTER_S)


def fleet_up() -> Fleet:
    """Both nodes are up, and nothing was ordered."""
    fleet = new_fleet()
    fleet.begin(0.0)
    for node in ("a", "b"):
        fleet.reported(node, 1, NodeStatus(KEEPER, [], []), 0.0)
    return fleet


def record(name: str, incarnation: int = 1, pid: int = 7) -> ProcessRecord:
    return ProcessRecord(name, pid, 1.0, (), incarnation)


def test_what_is_ordered_waits_for_the_node_to_come_up() -> None:
    fleet = new_fleet()
    assert fleet.begin(0.0) == [Launch("a"), Launch("b")]
    assert fleet.start("generator/0", 1) == []
    steps = fleet.reported("b", 1, NodeStatus(KEEPER, [], []), 1.0)
    order = StartProcess(PLAN.process("generator/0"), 1)
    assert steps == [NodeCame("b", 1, None), Tell("b", order)]
    assert fleet.reported("b", 1, ProcessStarted(record("generator/0")), 1.1) == [Started(record("generator/0"))]
    assert fleet.pids == {"generator/0": 7}


def test_a_node_that_cannot_be_started_fails_a_run_that_begins_and_is_tried_again_later_on() -> None:
    fleet = new_fleet()
    fleet.begin(0.0)
    fleet.start("generator/0", 1)
    failed = [NodeFailed("b", "no route"), NotStarted("generator/0", "no route")]
    assert fleet.launch_failed("b", "no route", 1.0) == failed, "nothing is waited for"
    fleet.validate()
    fleet = new_fleet()
    fleet.begin(0.0)
    died = "its keeper has ended with exit code 1"
    assert fleet.keeper_ended("b", died, 1.0) == [NodeFailed("b", died, "keeper/b")]
    fleet = fleet_up()
    fleet.keeper_ended("b", "its keeper has ended by SIGKILL", 5.0)
    tried_at_s, now_s = [], 5.0
    while len(tried_at_s) < 6:
        fleet.launch_failed("b", "no route", now_s)
        while fleet.tick(now_s) != [Launch("b")]:
            now_s += 0.1
        tried_at_s.append(now_s)
    gaps_s = [later - earlier for earlier, later in pairwise(tried_at_s)]
    assert gaps_s == sorted(gaps_s)
    assert gaps_s[-1] > 5 * gaps_s[0]


def test_a_launch_that_nothing_comes_of_counts_as_failed() -> None:
    fleet = new_fleet()
    fleet.begin(0.0)
    reason = f"its agent has not reported within {COMES_UP_WITHIN_S:g} s"
    assert fleet.tick(COMES_UP_WITHIN_S) == [NodeFailed("a", reason, "agent/a"), NodeFailed("b", reason, "agent/b")]


def test_a_silence_that_ends_in_time_harms_nothing_and_a_longer_one_costs_what_ran_there() -> None:
    fleet = fleet_up()
    fleet.start("generator/0", 1)
    fleet.reported("b", 1, ProcessStarted(record("generator/0")), 1.0)
    assert fleet.silent("b", "it was silent", 2.0) == [NodeSilent("b", "it was silent")]
    assert fleet.tick(2.0 + LOST_AFTER_S - 0.1) == []
    fleet.heard("b")
    assert fleet.tick(100.0) == []
    fleet.silent("b", "again", 100.0)
    lost, ended, launch = fleet.tick(100.0 + LOST_AFTER_S)
    assert isinstance(lost, NodeLost)
    assert ended == Ended(ProcessExit("generator/0", 7, -9, 1))
    assert launch == Launch("b")
    assert fleet.start("generator/0", 2) == []
    still_there = NodeStatus(KEEPER, [record("generator/0")], [])
    came, kill, start = fleet.reported("b", 1, still_there, 130.0)
    assert came == NodeCame("b", 1, 20.0)
    assert kill == Tell("b", KillProcess("generator/0", 1)), "it was given up"
    assert start == Tell("b", StartProcess(PLAN.process("generator/0"), 2))


def test_an_exit_that_died_with_an_agent_and_an_order_that_did_are_made_good() -> None:
    fleet = fleet_up()
    for name in ("generator/0", "generator/1"):
        fleet.start(name, 1)
    fleet.reported("b", 1, ProcessStarted(record("generator/0")), 1.0)
    exit_ = ProcessExit("generator/0", 7, 3, 1)
    steps = fleet.reported("b", 2, NodeStatus(KEEPER, [], [exit_]), 2.0)
    assert steps == [NodeCame("b", 2, None), Ended(exit_), Tell("b", StartProcess(PLAN.process("generator/1"), 1))]
    assert fleet.reported("b", 2, ProcessLeft(exit_), 2.1) == [], "said twice"


def test_what_ran_under_another_keeper_ended_with_it() -> None:
    fleet = fleet_up()
    fleet.start("generator/0", 1)
    fleet.reported("b", 1, ProcessStarted(record("generator/0")), 1.0)
    another = ProcessRecord("keeper/b", 200, 2.0, ())
    steps = fleet.reported("b", 2, NodeStatus(another, [], []), 2.0)
    assert Ended(ProcessExit("generator/0", 7, -9, 1)) in steps


def test_stop_and_kill_are_ordered_where_the_node_is_up_and_done_where_it_is_not() -> None:
    fleet = fleet_up()
    fleet.start("generator/0", 1)
    assert fleet.stop("generator/0", 5.0) == [Tell("b", StopProcess("generator/0", 1, 5.0))]
    assert fleet.kill("generator/0") == [Tell("b", KillProcess("generator/0", 1))]
    assert fleet.kill("generator/1") == []
    fleet.keeper_ended("b", "gone", 1.0)
    assert fleet.running == ("generator/0",), "it waits for its node"
    assert fleet.kill("generator/0") == [Ended(ProcessExit("generator/0", 0, -9, 1))]


def test_a_fleet_that_ends_starts_nothing_again() -> None:
    fleet = fleet_up()
    fleet.start("generator/0", 1)
    fleet.reported("b", 1, ProcessStarted(record("generator/0")), 1.0)
    assert fleet.end(5.0) == [Tell("a", EndNode(5.0)), Tell("b", EndNode(5.0))]
    assert fleet.keeper_ended("a", "its keeper has ended with exit code 0", 2.0) == []
    assert not fleet.is_over
    assert fleet.silent("b", "it closed the link", 2.0) == [Ended(ProcessExit("generator/0", 7, -9, 1))]
    assert fleet.is_over
    assert fleet.tick(1000.0) == []


def test_a_node_that_comes_up_while_the_fleet_ends_is_ended_too_and_starts_nothing() -> None:
    fleet = new_fleet()
    fleet.begin(0.0)
    stands = NodeStatus(KEEPER, [], [])
    fleet.reported("a", 1, stands, 0.0)
    fleet.start("generator/0", 1)
    assert fleet.end(5.0) == [Tell("a", EndNode(5.0)), Ended(ProcessExit("generator/0", 0, -9, 1))]
    assert fleet.reported("b", 1, stands, 1.0) == [NodeCame("b", 1, None), Tell("b", EndNode(5.0))]
    fleet.keeper_ended("a", "its keeper has ended with exit code 0", 2.0)
    assert not fleet.is_over
    fleet.keeper_ended("b", "its keeper has ended with exit code 0", 2.0)
    assert fleet.is_over


def test_an_agent_that_takes_the_place_of_one_while_the_fleet_ends_starts_nothing() -> None:
    fleet = fleet_up()
    fleet.start("generator/0", 1)
    fleet.end(5.0)
    steps = fleet.reported("b", 2, NodeStatus(KEEPER, [], []), 1.0)
    assert steps == [NodeCame("b", 2, None), Ended(ProcessExit("generator/0", 0, -9, 1)), Tell("b", EndNode(5.0))]


def test_what_was_to_leave_before_it_was_seen_to_run_does_not_start_on_the_next_keeper() -> None:
    fleet = fleet_up()
    fleet.start("generator/0", 1)
    fleet.kill("generator/0")
    steps = fleet.reported("b", 2, NodeStatus(ProcessRecord("keeper/b", 200, 1.0, ()), [], []), 1.0)
    assert steps == [NodeCame("b", 2, None), Ended(ProcessExit("generator/0", 0, -9, 1))]
    assert fleet.running == ()


# --- any course of events ------------------------------------------------------------------------------------


@dataclass
class FakeNode:
    """A keeper's view of its node, and two lossy channels. An agent's death loses what was under way upwards, a
    keeper's death everything."""

    keeper: int = 1
    agent: int = 1
    newest: dict[str, int] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    orders: list[Order] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    def stands(self) -> NodeStatus:
        running = [record(name, incarnation) for name, incarnation in self.running.items()]
        ended = [ProcessExit(name, 7, 0, n) for name, n in self.ended.items() if name not in self.running]
        return NodeStatus(ProcessRecord("keeper/b", 100 + self.keeper, 1.0, ()), running, ended)

    def obey(self, order: Order) -> None:
        match order:
            case StartProcess(spec=spec, incarnation=n) if n > self.newest.get(spec.name, 0):
                if spec.name in self.running:
                    self.leave(spec.name)
                self.newest[spec.name] = self.running[spec.name] = n
                self.reports.append(ProcessStarted(record(spec.name, n)))
            case StopProcess(name=name, incarnation=n) | KillProcess(name=name, incarnation=n):
                if self.running.get(name) == n:
                    self.leave(name)

    def leave(self, name: str) -> None:
        self.ended[name] = self.running.pop(name)
        self.reports.append(ProcessLeft(ProcessExit(name, 7, 0, self.ended[name])))


class FakeWorld:
    """Node b, and what has come of every incarnation of its processes."""

    def __init__(self) -> None:
        self.fleet, self.node, self.now_s = fleet_up(), FakeNode(), 0.0
        self.node.keeper = 0
        self.next = {"generator/0": 1, "generator/1": 1}
        self.ends: dict[tuple[str, int], int] = {}
        self.is_link_up = True

    def take(self, steps: list[Step]) -> None:
        for step in steps:
            match step:
                case Tell(node="b", order=order):
                    self.node.orders.append(order)
                case Ended(exit=ended):
                    key = ended.name, ended.incarnation
                    self.ends[key] = self.ends.get(key, 0) + 1
                case NotStarted():
                    pytest.fail("nothing of the kind was reported")
                case NodeLost():
                    self.node.orders.clear()
        self.fleet.validate()

    def act(self, choice: int) -> None:
        """One of the things that may happen now."""
        node, fleet, name = self.node, self.fleet, f"generator/{choice % 2}"
        self.now_s += 1.0
        match choice // 2 % 10:
            case 0 | 1 if name not in fleet.running:
                self.take(fleet.start(name, self.next[name]))
                self.next[name] += 1
            case 2:
                self.take(fleet.kill(name))
            case 3 | 4 | 5 if node.orders and self.is_link_up:
                order = node.orders[0] if choice % 4 == 0 else node.orders.pop(0)  # the same may come again
                node.obey(order)
            case 6 | 7 if node.reports and self.is_link_up:
                self.take(fleet.reported("b", node.agent, node.reports.pop(0), self.now_s))
            case 8 if name in node.running:
                node.leave(name)
            case 9:
                self.fail(choice // 20 % 6)

    def fail(self, kind: int) -> None:
        node, fleet = self.node, self.fleet
        if kind == 0:  # the agent dies, and the next one says how the node stands
            node.agent += 1
            node.reports = [node.stands()]
        elif kind == 1:  # the keeper dies, and all with it
            self.node = FakeNode(node.keeper + 1, node.agent + 1, orders=node.orders)
            self.node.reports = [self.node.stands()]
            self.take(fleet.keeper_ended("b", "killed", self.now_s))
        elif kind == 2:  # the link is cut for longer than the lease
            self.take(fleet.silent("b", "cut", self.now_s))
            self.now_s += LOST_AFTER_S
            self.take(fleet.tick(self.now_s))
            self.node = FakeNode(node.keeper + 1, node.agent + 1)
            self.node.reports = [self.node.stands()]
        elif kind == 3:
            self.take(fleet.silent("b", "cut", self.now_s))
            fleet.heard("b")
        elif kind == 4:  # the link is cut, and the node goes on all the same
            self.take(fleet.silent("b", "cut", self.now_s))
            self.now_s += LOST_AFTER_S
            self.take(fleet.tick(self.now_s))
            node.reports = [node.stands()]
        else:  # the keeper dies, and nobody has seen it
            self.node = FakeNode(node.keeper + 1, node.agent + 1, orders=node.orders)
            self.node.reports = [self.node.stands()]

    def settle(self) -> None:
        for name in self.fleet.running:
            self.take(self.fleet.kill(name))
        for _ in range(200):
            if self.node.orders:
                self.node.obey(self.node.orders.pop(0))
            elif self.node.reports:
                self.take(self.fleet.reported("b", self.node.agent, self.node.reports.pop(0), self.now_s))


@given(st.lists(st.integers(0, 119), max_size=60))
@example([0, 106, 118])
def test_every_incarnation_that_was_started_ends_once_and_nothing_else_is_left(choices: list[int]) -> None:
    world = FakeWorld()
    for choice in choices:
        world.act(choice)
    world.settle()
    started = {(name, n) for name, following in world.next.items() for n in range(1, following)}
    assert world.ends == dict.fromkeys(started, 1)
    assert world.node.running == {}, "what was given up does not go on"
    assert world.fleet.running == ()
