"""Lifecycles: what is drawn in docstrings is what the code does."""

import doctest
import textwrap
from types import ModuleType

import pytest

from darts_async import transitions
from darts_async.protocol import sample_id_of
from darts_async.shaper import group
from darts_async.shaper.group import Sample, Stage
from darts_async.transitions import IllegalTransition, Transitions
from launcher.lifecycle import lifecycle
from launcher.nodes import fleet
from launcher.nodes.fleet import Node

LIVES = {"sample": (group, group.SAMPLE_LIFE), "node": (fleet, fleet.NODE_LIFE), "run": (lifecycle, lifecycle.RUN_LIFE)}


@pytest.mark.parametrize("name", LIVES)
def test_the_picture_of_a_lifecycle_is_made_from_its_table(name: str) -> None:
    module, life = LIVES[name]
    picture = textwrap.indent(life.picture(), "    ")
    assert picture in str(module.__doc__), f"the docstring of {module.__name__} should hold\n\n{picture}\n"


@pytest.mark.parametrize("name", LIVES)
def test_every_state_of_a_lifecycle_can_be_reached(name: str) -> None:
    life: Transitions = LIVES[name][1]
    reached = {next(iter(life.events))[0]}
    for now, then in life.events:
        assert now in reached, "the table is in the order in which a life goes"
        reached.add(then)


def test_the_stages_of_a_sample_are_those_of_its_table() -> None:
    assert {state for pair in group.SAMPLE_LIFE.events for state in pair} == {stage.value for stage in Stage}


def test_an_illegal_transition_raises_with_the_story() -> None:
    sample = Sample(sample_id_of(7, 3))
    for stage in (Stage.DECODING, Stage.WAITING, Stage.DECODING, Stage.FINISHED):
        sample.to(stage)
    story = f"sample {sample.sample_id} .waiting, decoding, waiting, decoding, finished; 0 tokens"
    with pytest.raises(
        IllegalTransition, match=f"{story}.*finished -> cancelling is illegal, after finished comes scored"
    ):
        sample.to(Stage.CANCELLING)
    assert sample.stage is Stage.FINISHED


def test_a_node_that_never_came_up_cannot_be_lost() -> None:
    with pytest.raises(IllegalTransition, match=r"node left \(starting\): starting -> lost is illegal"):
        Node("left").to("lost")


@pytest.mark.parametrize("module", [transitions])
def test_the_examples_are_right(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0
