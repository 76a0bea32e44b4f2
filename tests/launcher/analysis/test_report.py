"""The page about a run: what is in it, and what cannot be reported of."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from darts_async.protocol import sample_id_of
from darts_async.shaper.ledger import LedgerWriter, SampleEnded
from darts_async.trace import Trace, trace_path
from launcher.analysis.report import PLOTS, write_report
from launcher.analysis.run_data import gather
from launcher.commands.cli import app
from launcher.run_dir.run_dir import RunRecord, write_record
from tests.launcher.analysis.test_rollouts import write
from tests.test_rollouts import rollout


def line(step: int, **metrics: Any) -> str:
    return json.dumps({"type": "step", "step": step, "elapsed_s": float(step), **metrics})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was killed in its fourth step: a torn line, a torn record, no summary."""
    (tmp_path / "config.yaml").write_text("name: made\n")
    write_record(tmp_path, RunRecord("running", "", 0.0, None, 1))
    lines = [line(step, **{"reward/mean": 0.25 * step, "staleness/mean": 1.0}) for step in range(3)]
    lines.insert(2, line(1, **{"weights/total_s": 0.5}))
    lines.append(json.dumps({"type": "evaluation", "policy_version": 0, "reward/mean": 0.1}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"type": "st')
    ledger = LedgerWriter(tmp_path / "ledger.msgpack")
    for step in range(3):
        for index in range(4):
            ledger.append([SampleEnded(sample_id_of(step, index), "trained", "why", 10 + index, 0, 0, step, 1.0)])
        ledger.append([SampleEnded(sample_id_of(step, 4), "cancelled", "why", 5, 0, 0, None, None)])
    ledger.close()
    return tmp_path


def test_what_a_run_has_left_is_gathered_as_far_as_it_is_whole(run_dir: Path) -> None:
    data = gather(run_dir)
    assert data.series("reward/mean") == ([0, 1, 2], [0.0, 0.25, 0.5])
    assert data.steps[1]["weights/total_s"] == 0.5, "lines of one step are one"
    assert (len(data.ended), len(data.trained), len(data.evaluations)) == (15, 12, 1)
    assert (data.summary, data.spent, data.away) == (None, [], [])


def test_the_page_needs_nothing_beside_itself(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(run_dir), "--out", str(out)])
    assert result.exit_code == 0, result.output
    page = out.read_text()
    assert page.count("<svg") == len(PLOTS)
    assert "15, of which 12 were trained on" in page
    assert all(word not in page for word in ("<script", "<link", 'src="', "@import"))


def test_samples_of_an_early_and_a_late_step_are_on_it_as_text(run_dir: Path) -> None:
    assert "<h2>Samples</h2>" not in page_of(run_dir), "none were kept"
    for step in (0, 1, 2):
        write(
            run_dir,
            [
                rollout(f"{step}/0", step=step, text=f"<b>best of {step}</b>\x1b[2J", reward=1.0, length=9),
                rollout(f"{step}/1", step=step, text=f"worst of {step}", reward=0.0, length=9),
                rollout(f"{step}/2", step=step, text=f"middle of {step}", reward=0.5, length=9),
                rollout(f"{step}/3", step=step, text=f"cut of {step} " + "x" * 5000, outcome="cancelled", length=99),
            ],
        )
    page = page_of(run_dir)
    for step in (0, 2):
        assert f"&lt;b&gt;best of {step}&lt;/b&gt;\\u001b[2J" in page
        assert f"worst of {step}" in page
        assert f"cut of {step} " in page
    assert "of 1" not in page.split("<h2>Samples</h2>")[1]
    assert "middle of" not in page


def page_of(run_dir: Path) -> str:
    write_report(run_dir, run_dir / "page.html")
    return (run_dir / "page.html").read_text()


def test_who_was_gone_is_on_it(run_dir: Path) -> None:
    for incarnation in (1, 2):
        path = trace_path(run_dir, "shaper/0", incarnation)
        path.parent.mkdir(exist_ok=True)
        trace = Trace(path, "shaper/0", incarnation, max_bytes=1_000_000)
        trace.instant("version published", policy_version=0)
        trace.flush()
        trace.close()
    data = gather(run_dir)
    [(process, since_s, until_s)] = data.away
    assert process == "shaper/0"
    assert 0 <= since_s <= until_s
    write_report(run_dir, run_dir / "page.html")
    assert "Absent processes" in (run_dir / "page.html").read_text()


def test_there_is_nothing_to_report_before_a_step(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text("")
    result = CliRunner().invoke(app, ["report", str(run_dir)])
    assert result.exit_code == 2
    assert "has no step yet" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("metrics.jsonl", "poem\n", "has no step yet"),
        ("summary.json", "{}", "not a summary of this version"),
        ("ledger.msgpack", "\x93", "holds no sample"),
    ],
)
def test_what_is_damaged_is_named(run_dir: Path, name: str, content: str, why: str) -> None:
    (run_dir / name).write_text(content, "latin-1")
    if name == "ledger.msgpack":
        (run_dir / name).write_bytes(b"\x81\xa4type\xa4Poem")
    result = CliRunner().invoke(app, ["report", str(run_dir)])
    assert result.exit_code == 2
    assert why in result.output.replace("\n", " ")
    assert name in result.output.replace("\n", "")


def test_without_matplotlib_it_says_what_to_install(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(app, ["report", str(run_dir)])
    assert result.exit_code == 2
    assert "darts-async[report]" in result.output.replace("\n", "")


def test_a_file_that_cannot_be_written_is_named(run_dir: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run_dir), "--out", str(run_dir / "no" / "page.html")])
    assert result.exit_code == 2
    assert "cannot be written" in result.output.replace("\n", " ")
