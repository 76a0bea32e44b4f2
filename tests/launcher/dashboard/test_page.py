"""The files of the page: they are in the package, load nothing from elsewhere, and read no text as markup."""

import re
from importlib.resources import files

from darts_async.topology.outcomes import OUTCOMES
from launcher.dashboard.answers import PAGE_FILES
from launcher.dashboard.charts import CHARTS
from launcher.progress.metric_names import EVALUATION_METRICS, metric_of

PAGE = {path.name: path.read_text("utf-8") for path in (files("launcher.dashboard") / "page").iterdir()}


def test_every_file_of_the_page_is_served() -> None:
    assert set(PAGE) == {name for name, _ in PAGE_FILES.values()}


def test_no_text_becomes_markup_or_code() -> None:
    """The Content-Security-Policy forbids the rest: scripts and styles inside the page."""
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|\beval\b|Function\("
    )
    for name, text in PAGE.items():
        assert not re.findall(ways, text), name
    assert not re.findall(r"<script(?! type=\"module\" src=)|<style|\sstyle=|\son\w+=", PAGE["page.html"])


def test_nothing_is_loaded_from_elsewhere() -> None:
    for name, text in PAGE.items():
        addresses = set(re.findall(r"https?://[^\s\"')]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        assert "@import" not in text
    imported = {name for text in PAGE.values() for name in re.findall(r"from \"\./(\S+)\"", text)}
    assert imported < set(PAGE)


def test_every_outcome_has_a_colour_in_both_schemes() -> None:
    for outcome in OUTCOMES:
        assert PAGE["style.css"].count(f"--{outcome}:") == 2


def test_every_metric_of_a_chart_is_in_the_table_of_metrics() -> None:
    for chart in CHARTS:
        named = [*(each.metric for each in chart.series), *(chart.band or ()), chart.family.replace("*", "any")]
        assert [name for name in named if name and metric_of(name) is None] == []
        assert not chart.evaluated or metric_of(chart.evaluated, EVALUATION_METRICS)


def test_no_metric_is_in_two_charts() -> None:
    named = [each.metric for chart in CHARTS for each in chart.series] + [name for c in CHARTS for name in c.band or ()]
    assert len(named) == len(set(named))
    assert len({chart.title for chart in CHARTS}) == len(CHARTS)
