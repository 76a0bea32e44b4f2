"""What happens to the runs of `bench.faults`: in turn, the same for the same seed, and counted."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench.faults import chosen, one_run, table
from bench.hardships import (
    HARDSHIPS,
    TAILS,
    Toll,
    checkpoints,
    cut_tails,
    flip_bit,
    order_lie,
    rogue_python,
    rotated,
    shortened,
)
from bench.ordeal import Results

SEED = 12
"""The launcher dies once, while a resumed run starts."""
SIZES = dict(zip(TAILS, (5000, 70_000, 900, 80, 200), strict=True))


def test_each_hardship_comes_as_often_as_any_other_and_in_order() -> None:
    runs = [rotated(HARDSHIPS, index) for index in range(len(HARDSHIPS))]
    assert set(Counter(name for run in runs for name in run).values()) == {3}
    assert all(list(run) == sorted(set(run), key=HARDSHIPS.index) for run in runs)
    assert rotated(("copy",), 5) == ("copy",)
    assert rotated((), 5) == ()


def test_tails_are_cut_as_the_seed_says_alone_and_together_short_and_to_nothing() -> None:
    losses = [shortened(SIZES, random.Random(seed)) for seed in range(300)]
    assert losses == [shortened(SIZES, random.Random(seed)) for seed in range(300)]
    assert {len(left) for left in losses} == {1, 2, 3, 4, 5}
    lone = {next(iter(left)) for left in losses if len(left) == 1}
    assert lone == set(TAILS)
    assert all(left[name] < SIZES[name] for left in losses for name in left)
    emptied = {name for left in losses for name, size in left.items() if size == 0}
    assert emptied == set(TAILS)
    assert any(SIZES[name] - size <= 16 for left in losses for name, size in left.items())
    assert shortened({"state.json": 0}, random.Random(0)) == {}


def test_files_of_a_dead_run_lose_their_ends_and_nothing_else(tmp_path: Path) -> None:
    whole = {name: bytes(index % 251 for index in range(size)) for name, size in SIZES.items()}
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    words = cut_tails(tmp_path, random.Random(1))
    for name, content in whole.items():
        left = (tmp_path / name).read_bytes()
        assert content.startswith(left)
        assert (f"{name} {len(content)} -> {len(left)}" in words) == (len(left) < len(content))


def test_one_bit_of_the_newest_checkpoint_changes(tmp_path: Path) -> None:
    for name in ("step-000020", "step-000100", "step-000120.damaged", ".step-000140.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").write_bytes(bytes(64))
        (tmp_path / "checkpoints" / name / "shaper.state").write_bytes(b"")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000020", "step-000100"]
    words = flip_bit(tmp_path, random.Random(0))
    assert words.startswith("step-000100/manifest.json, bit ")
    contents = {path.parent.name: path.read_bytes() for path in tmp_path.rglob("manifest.json")}
    assert sum(byte.bit_count() for byte in contents.pop("step-000100")) == 1
    assert set(contents.values()) == {bytes(64)}


@pytest.mark.slow
def test_one_process_of_a_run_is_once_a_rogue(tmp_path: Path) -> None:
    python = rogue_python(tmp_path, sys.executable)

    def started(name: str) -> str:
        code = "import os, sys; print(os.environ.get('LIE', 'honest'), *sys.argv[1:])"
        argv = [str(python), "-c", code, "darts_async.generator.process", "--name", name, "--incarnation", "3"]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split(" ", 2)[:2].__str__()

    assert started("generator/1") == "['honest', 'darts_async.generator.process']"
    order_lie(tmp_path, "generator/1", "end_of_run")
    assert started("generator/0") == "['honest', 'darts_async.generator.process']"
    assert started("generator/1") == "['end_of_run', 'tests.fakes.rogue']"
    assert started("generator/1") == "['honest', 'darts_async.generator.process']"


def test_the_table_says_what_each_hardship_has_come_to_and_what_could_not_be_had() -> None:
    results = Results()
    results.tolls["copy"] = Toll(4, 3, 1, 12.34, "it ran")
    results.tolls["tails"] = Toll(2, 2, 0, 5.0, "state.json 200 -> 0")
    text = table(results, "Without a full disk: mounting is not permitted here.")
    assert "| tails | 2 | 2 | 0 | 5.0 s | state.json 200 -> 0 |\n| copy | 4 | 3 | 1 | 12.3 s | it ran |" in text
    assert "Without a full disk: mounting is not permitted here." in text
    assert "hardship" not in table(Results())


def test_hardships_are_chosen_by_name_and_left_out_where_they_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.faults.why_not", lambda: None)
    assert chosen([], "scripted") == (HARDSHIPS, "")
    assert chosen([], "embedded") == ((), "")
    assert chosen(["none"], "scripted") == ((), "")
    assert chosen(["copy", "tails"], "embedded") == (("tails", "copy"), "")
    monkeypatch.setattr("bench.faults.why_not", lambda: "no root")
    names, missing = chosen(["all"], "scripted")
    assert set(names) == set(HARDSHIPS) - {"full-disk"}
    assert missing == "Without a full disk: no root."


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_whose_launcher_dies_while_roles_import_and_at_whose_ports_strangers_knock_is_clean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.faults.STEPS_PER_HARDSHIP", 20)
    results = Results()
    one_run("scripted", 0, ("imports", "descriptors"), 0, random.Random(SEED), results)
    assert results.failures == []
    assert {name: (toll.times, toll.runs, toll.failed) for name, toll in results.tolls.items()} == {
        "imports": (1, 1, 0),
        "descriptors": (1, 1, 0),
    }
