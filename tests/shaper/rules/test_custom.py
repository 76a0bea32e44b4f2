"""Rules of the user's: what they see, what they may decide, and what is said of a mistake."""

import dataclasses

import pytest

from darts_async.config import RunConfig
from darts_async.errors import ExtensionError
from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.rules.custom import GroupView, UserRule, try_rule
from tests.fakes import rules
from tests.shaper.rules.test_selection import group_of
from tests.shaper.world import prompts


def config_of(name: str, **shaping: object) -> RunConfig:
    return RunConfig.model_validate(
        {"shaping": {"rule": f"tests.fakes.rules:{name}", "keep": 3, "launch": 5, **shaping}}
    )


def test_a_rule_sees_each_sample_and_can_change_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[GroupView] = []

    def to_cancel(self: rules.Alternating, group: GroupView) -> list[int]:
        seen.append(group)
        return []

    monkeypatch.setattr(rules.Alternating, "to_cancel", to_cancel)
    stages = [Stage.WAITING, Stage.DECODING, Stage.FINISHED, Stage.SCORED, Stage.UNSCORABLE, Stage.CANCELLING]
    group = Group(7, prompts(4)[3], "train", [Sample(number, stage) for number, stage in enumerate(stages)])
    group.samples[1].num_tokens = 12
    group.samples[3].reward = 0.5
    rule = UserRule(config_of("Alternating").shaping, seed=2)
    assert rule.to_cancel(group) == []
    (view,) = seen
    assert [each.status for each in view.samples] == ["running", "running", "finished", "scored", "gone", "gone"]
    assert (view.group_id, view.prompt_id, view.samples[1].num_tokens, view.samples[3].reward) == (7, 3, 12, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        view.samples[0].num_tokens = 5  # type: ignore[misc]


def test_the_seed_differs_from_group_to_group_and_from_run_to_run() -> None:
    views = [
        UserRule(config_of("Alternating").shaping, seed)._view(Group(group_id, prompts(1)[0], "train", []))
        for seed in (0, 1)
        for group_id in (0, 1)
    ]
    assert len({view.seed for view in views}) == 4


def test_what_it_names_is_cancelled_and_kept_with_its_weight() -> None:
    rule = UserRule(config_of("Alternating").shaping, 0)
    rule.state = b"stop early"
    group = group_of([5, 4, 3, 2, 1])
    group.samples[4].stage = Stage.DECODING
    assert rule.to_cancel(group) == [group.samples[4]]
    group.samples[4].stage = Stage.CANCELLING
    assert rule.select(group) == [(sample, 1.0) for sample in group.samples[1:4]]
    assert rule.state == b""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Stranger", r"to_cancel of group 0 named sample 1000000000, but the samples that are running are \["),
        ("Early", r"select of group 0 named sample -1, but the samples that are scored are \[0, 1, 2, 3, 4\]"),
        ("Greedy", "select of group 0 gave 5 samples of shaping.keep 3"),
        ("Weightless", "select of group 0 gave a weight of 0.0; give positive numbers"),
        ("Idle", "selects 0 of 5 scored samples, but a group is trained on 2 at least .shaping.min_keep."),
        ("Raises", "select raised ZeroDivisionError"),
        ("Forgetful", "state is str; it must be bytes, 1,048,576 at most"),
    ],
)
def test_a_mistake_is_found_on_a_made_up_group(name: str, message: str) -> None:
    with pytest.raises(ExtensionError, match=f"shaping.rule 'tests.fakes.rules:{name}'.*{message}"):
        try_rule(config_of(name))


def test_a_rule_without_a_mistake_passes() -> None:
    try_rule(config_of("Alternating"))
