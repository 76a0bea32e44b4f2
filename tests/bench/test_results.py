"""What benchmarks leave can be read by people and programs, and shows what was measured."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.charts import Panel, draw_bars, draw_curves, draw_shares
from bench.measured import ROOT
from bench.results import BY_HAND, called, keep, keep_text, spread, table

PNG_HEAD = b"\x89PNG"


def test_numbers_say_how_they_came_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / "deep"), "--steps", "3"])
    keep(tmp_path / "deep", "speed", "# Speed", {"rates": [1.5, 2.5]}, schema=7)
    found = json.loads((tmp_path / "deep" / "speed.json").read_text())
    assert found["command"] == called("speed") == "python -m bench.speed --out deep --steps 3"
    assert (found["schema"], found["rates"]) == (7, [1.5, 2.5])
    assert found["commit"]
    assert "cores" in found["hardware"]
    assert (tmp_path / "deep" / "speed.md").read_text() == "# Speed\n"


def test_nothing_is_written_where_nothing_is_wanted(tmp_path: Path) -> None:
    keep(None, "speed", "# Speed", {})
    assert not list(tmp_path.iterdir())


def test_what_was_written_by_hand_outlasts_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "speed.md"
    keep_text(path, "# Speed 1\n")
    path.write_text(path.read_text() + f"\n{BY_HAND}\n\nIt was slow.\n")
    for number in (2, 3):
        keep_text(path, f"# Speed {number}\n")
        assert path.read_text() == f"# Speed {number}\n\n{BY_HAND}\n\nIt was slow.\n"


def test_a_spread_is_shown_if_there_is_one() -> None:
    assert spread([1.0, 2.0, 4.0], ".1f") == "2.0 ± 1.5"
    assert spread([2.0], ".1f") == "2.0"
    assert spread([2.001, 2.0], ".1f") == "2.0"


def test_a_table_is_as_wide_as_its_titles() -> None:
    assert table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Those of the last figure, in order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found: list[Any] = []
    monkeypatch.setattr(plt, "close", lambda figure: found.extend(figure.axes))
    yield found
    monkeypatch.undo()
    plt.close("all")


def test_curves_go_through_their_points_in_the_colour_of_their_name(tmp_path: Path, axes: list[Any]) -> None:
    panels = [
        Panel("n", "rate", {"ours": [(1, 10), (10, 30)], "theirs": [(1, 5), (10, 6)]}, log="x", levels={"goal": 20}),
        Panel("n", "rate", {"theirs": [(2, 7), (3, 8)]}),
    ]
    draw_curves(tmp_path / "a" / "curves.png", panels)
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(PNG_HEAD)
    first, second = axes
    ours, theirs, goal = first.get_lines()
    assert ours.get_xydata().tolist() == [[1, 10], [10, 30]]
    assert set(goal.get_ydata()) == {20}
    assert (first.get_xscale(), first.get_yscale(), second.get_xscale()) == ("log", "linear", "linear")
    assert second.get_lines()[0].get_color() == theirs.get_color() != ours.get_color()


def test_bars_are_medians_and_stand_in_their_group(tmp_path: Path, axes: list[Any]) -> None:
    draw_bars(tmp_path / "bars.png", {"small": {"a": [1, 2, 6], "b": [3]}, "large": {"b": [300, 100]}}, "ms")
    [axis] = axes
    heights = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axis.patches)
    assert [height for _, height in heights] == [2, 3, 200]
    assert [round(place) for place, _ in heights] == [0, 0, 1]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["small", "large"]
    assert {text.get_text() for text in axis.texts} == {"2", "3", "200"}


def test_shares_of_a_bar_lie_behind_one_another(tmp_path: Path, axes: list[Any]) -> None:
    draw_shares(tmp_path / "shares.png", {"run": {"learner/0": {"busy": 0.75, "idle": 0.25}, "shaper/0": {"idle": 1}}})
    [axis] = axes
    found = [(bar.get_x(), bar.get_width()) for bar in axis.patches if bar.get_width()]
    assert found == [(0, 0.75), (0.75, 0.25), (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "numbers"),
    [
        ("transport", ["--messages", "400", "--repeats", "2"], "links"),
        ("weights", ["--megabytes", "1", "--receivers", "1", "--repeats", "2"], "updates"),
        ("shaper", ["--steps", "4", "--repeats", "1", "--in-flight", "100", "--seconds", "0.1"], "state_machine"),
        ("scale", ["--accelerators", "2", "4", "--steps", "3", "--workload", "fixed"], "weak"),
    ],
)
def test_a_benchmark_leaves_a_table_numbers_and_a_picture(
    tmp_path: Path, name: str, arguments: list[str], numbers: str
) -> None:
    command = [sys.executable, "-m", f"bench.{name}", *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / f"{name}.md").read_text()
    assert text == done.stdout.rstrip("\n") + "\n"
    assert f"python -m bench.{name}" in text
    assert f"({name}.png)" in text
    assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG_HEAD)
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found[numbers]
