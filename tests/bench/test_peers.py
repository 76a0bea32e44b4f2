"""The race with another trainer: both run the same task, and the clock is read fairly."""

import argparse
from pathlib import Path

import pytest

from bench.learning import JUDGES
from bench.peers import (
    OURS,
    config_of,
    held_out_reward,
    main,
    ours,
    reward_function,
    settings_of,
    trls,
    with_shaping,
    write,
)
from bench.peers_report import RACES, SCHEMA, TRL, Climb, Race, Results, report
from bench.quickstart.tokenizer import EOS_ID, build_tokenizer
from bench.results import taken_over
from darts_async.errors import ConfigError
from darts_async.models.location import resolve_model_path
from darts_async.prompts.load import load_prompts

MODEL = resolve_model_path("darts_async.quickstart:model")
KEPT = ("peers", Results, SCHEMA)


def test_a_run_ends_where_it_is_there_first() -> None:
    rewards = [(0.0, 0, 0.5), (10.0, 10, 0.91), (20.0, 20, 0.89), (30.0, 30, 0.95)]
    assert Climb("chain", 256, "ours", 0, rewards).reached() == (10.0, 10, True)
    assert Climb("chain", 256, "ours", 0, rewards[:1]).reached() == (0.0, 0, False)
    assert Climb("search", 256, "ours", 0, [(0.0, 0, 0.9)]).reached() == (0.0, 0, True)


def results() -> Results:
    """Two seeds of both tasks: 10 and 20 s for ours, four times that for the other."""
    climbs = [
        Climb(task, 256, name, seed, [(0.0, 0, 0.5), (seconds * (seed + 1), 10, 0.87)])
        for task in RACES
        for seed in (0, 1)
        for name, seconds in {**dict.fromkeys(OURS, 10.0), TRL: 40.0}.items()
    ]
    return Results(commits=["abc"], runs=climbs)


def test_each_task_has_its_target_and_ratios_of_its_own_seeds() -> None:
    chain, search = report(results()).split("## ")[1:]
    assert "seconds to 0.9 " in chain
    assert "| TRL | 2 | 60 (40 to 80) | 10 (10 to 10) | 6.00 (4.00 to 8.00) | 1.00 (1.00 to 1.00) | 2 |" in chain
    assert "seconds to 0.845 " in search
    assert (
        "qlpo 8 of 10 | 2 | 15 (10 to 20) | 10 (10 to 10) | 1.50 (1.00 to 2.00) | 4.00 (4.00 to 4.00) | 0 |" in search
    )


def test_a_seed_counts_when_the_other_has_run_it_too() -> None:
    found = results()
    del found.runs[-1]
    assert "qlpo 8 of 10 | 1 | 10 | 10 | 1.00 | 4.00 | 0 |" in report(found)


def test_runs_that_are_there_are_taken_over(tmp_path: Path) -> None:
    write(argparse.Namespace(out=tmp_path), results())
    assert (tmp_path / "peers_search_256.png").stat().st_size > 0
    found = taken_over(argparse.Namespace(out=tmp_path, resume=True), *KEPT)
    assert found is not None
    assert found == results()
    assert found.has("chain", 256, TRL, 1)
    assert not found.has("chain", 512, TRL, 1)


@pytest.mark.parametrize("text", ['{"schema": 2, "commits": [], "runs": []}', '{"runs": 3}', "[", ""])
def test_results_of_another_schema_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "peers.json").write_text(text)
    with pytest.raises(ConfigError, match=r"peers\.json has no results of schema 3 .* move it away"):
        taken_over(argparse.Namespace(out=tmp_path, resume=True), *KEPT)


@pytest.mark.parametrize("name", OURS)
def test_ours_are_valid_runs_with_what_the_other_trains_on(name: str, tmp_path: Path) -> None:
    config = config_of(with_shaping(settings_of("chain", tmp_path, 256), OURS[name], 3))
    assert (config.seed, config.learner.steps, config.learner.groups_per_step, config.shaping.keep) == (3, 100, 16, 8)


def test_the_other_trainer_gets_the_reward_of_the_task() -> None:
    tokenizer = build_tokenizer()
    judge = reward_function(Path(MODEL), JUDGES["chain"])
    right, wrong = (tokenizer.encode(f"+5 2 ans {answer}").ids for answer in (2, 3))
    assert judge([[*right, EOS_ID], right, [*wrong, EOS_ID], []], ["2", "2", "2", "2"]) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.slow
def test_the_held_out_reward_is_of_these_prompts_and_answers(tmp_path: Path) -> None:
    config = config_of(with_shaping(settings_of("chain", tmp_path, 256), next(iter(OURS.values())), 0))
    held_out = load_prompts(config).held_out[:64]

    def even(text: str, answer: str, finished: bool) -> float:
        return JUDGES["chain"](text, answer, finished) * (int(answer) % 2 == 0)

    of_all, of_even = (held_out_reward(MODEL, config, held_out, judge) for judge in (JUDGES["chain"], even))
    assert 0.4 < of_all < 0.8
    assert 0 < of_even < of_all


@pytest.mark.timeout(600)  # TRL computes with all cores, which are shared with whatever else is tested
@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ours", "TRL"])
def test_a_run_is_evaluated_on_its_way(trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RACES, "chain", Race(target=0.99, steps=16, every_steps=8))
    settings = settings_of("chain", tmp_path, 256)
    climb = ours("chain", next(iter(OURS)), settings, 0) if trainer == "ours" else trls("chain", settings, 0, 600)
    assert [steps for _, steps, _ in climb] == [0, 8, 16]
    (began_s, _, before), (first_s, _, _), (last_s, _, after) = climb
    assert 0 <= began_s < first_s < last_s
    assert 0.4 < before < after


def test_a_task_that_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["peers", "--tasks", "chess"])
    with pytest.raises(SystemExit):
        main()
    assert "invalid choice: 'chess' (choose from 'chain', 'search')" in capsys.readouterr().err
