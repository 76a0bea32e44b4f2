"""The tables of roles and links."""

import typing

import pytest

from darts_async import protocol
from darts_async.protocol import Message
from darts_async.topology import links, roles
from darts_async.topology.links import LINKS, link_between, link_named
from darts_async.topology.roles import (
    GENERATOR,
    LAUNCHER,
    LEARNER,
    REWARD,
    ROLES,
    SHAPER,
    may_accuse_each_other,
    role_of,
)

NAMES = {role.name: role.processes(3) for role in ROLES} | {"agent": ("agent/a", "agent/b")}


@pytest.mark.parametrize("role", ROLES, ids=str)
def test_a_process_is_of_the_role_that_its_name_begins_with(role: roles.Role) -> None:
    assert role_of(role.process(12)) is role


@pytest.mark.parametrize("name", ["", "cook/0", "generators", "gen"])
def test_a_name_of_no_process_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ValueError, match="shaper, learner, reward, generator, launcher, agent, keeper"):
        role_of(name)


def test_names_are_unique_and_every_constant_is_an_entry() -> None:
    for kind, module, table in ((roles.Role, roles, ROLES), (links.Link, links, LINKS)):
        assert len({each.name for each in table}) == len(table)
        constants = [value for value in vars(module).values() if isinstance(value, kind)]
        assert {id(each) for each in table} <= {id(each) for each in constants}


def test_links_have_the_members_that_the_design_names() -> None:
    assert {link.name: (link.hub, link.members(NAMES)) for link in LINKS} == {
        "generators": ("shaper/0", ("generator/0", "generator/1", "generator/2")),
        "rewards": ("shaper/0", ("reward/0", "reward/1", "reward/2")),
        "learner": ("shaper/0", ("learner/0",)),
        "weights": ("learner/0", ("generator/0", "generator/1", "generator/2")),
        "launcher": ("launcher", tuple(name for role in ROLES for name in NAMES[role.name])),
        "agents": ("launcher", ("agent/a", "agent/b")),
        "ranks": ("learner/0", ("learner/1", "learner/2")),
        "workers": ("generator/*", ()),
    }


def test_every_message_of_the_protocol_is_on_a_link() -> None:
    said = {message for link in LINKS for union in (link.hub_sends, link.member_sends) for message in _of(union)}
    defined = {each for each in vars(protocol).values() if isinstance(each, type) and issubclass(each, Message)}
    assert said == defined - {Message}


def test_the_link_between_a_hub_and_a_role_is_found() -> None:
    assert link_between(SHAPER.first, REWARD) is link_named("rewards")
    assert link_between(LAUNCHER, LEARNER) is link_named("launcher")
    with pytest.raises(ValueError, match="not enough values"):
        link_between(SHAPER.first, SHAPER)


def test_shaper_and_learner_judge_each_other_and_no_other_two_do() -> None:
    judges = {(one, other) for one in NAMES for other in NAMES if may_accuse_each_other(f"{one}/0", f"{other}/1")}
    assert judges == {("shaper", "learner"), ("learner", "shaper")}


def test_what_a_role_may_tell_the_launcher_is_in_the_union_of_its_link() -> None:
    union = _of(link_named("launcher").member_sends)
    assert all(message in union for role in ROLES for message in role.tells_launcher)
    assert GENERATOR.tells_launcher == ()


def _of(union: object) -> tuple[type, ...]:
    """The classes of a union, of one class, or of nothing."""
    return () if union is None else typing.get_args(union) or (typing.cast(type, union),)
