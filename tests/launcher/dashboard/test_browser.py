"""The page in a real browser: a live run and its end, charts, samples, a click, and text that would be markup."""

import json
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.dashboard.runs import ShownRuns
from launcher.dashboard.server import DashboardServer
from launcher.run_dir.run_dir import RunRecord, write_record
from tests.launcher.analysis.test_rollouts import write
from tests.support.chromium import Chromium
from tests.support.launched import LaunchedRun
from tests.test_rollouts import rollout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>\u202e</pre>"
SHOWN = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>\\u202e</pre>"
PICTURE_BYTES = 8_000
"""An empty page of this size is smaller as PNG."""


@pytest.fixture
def browser() -> Iterator[Chromium]:
    with Chromium() as running:
        running.look(1280)
        yield running


def section(browser: Chromium, name: str, *runs: str) -> None:
    fields = json.dumps([["section", name], *(["run", run] for run in runs)])
    browser.evaluate(f"location.hash = new URLSearchParams({fields})")
    browser.wait_until(f"document.querySelector('nav a[aria-current]')?.textContent.toLowerCase() === '{name}'")


def number_of(browser: Chromium, selector: str) -> int:
    return int(browser.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length"))


def test_a_live_run_is_watched_to_its_end(tmp_path: Path, browser: Chromium) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", {"learner": {"steps": 1_000_000}}) as run:
        run.wait_for_steps(2)
        dashboard = run.begin("dashboard", "runs")
        try:
            run.wait_until(lambda: "(Ctrl-C ends it)" in run.output)
            [url] = re.findall(r"http://127\.0\.0\.1:\d+/\S+/", run.output)
            browser.open(url)
            watch_it_live(browser, run)
            watch_its_end(browser, run)
            assert {each.startswith(url) or each == "about:blank" for each in browser.addresses()} == {True}
            dashboard.send_signal(signal.SIGINT)
            assert dashboard.wait(20) == 0, run.output
        finally:
            dashboard.kill()
            dashboard.wait(20)


def watch_it_live(browser: Chromium, run: LaunchedRun) -> None:
    """The numbers grow, and a death is told."""
    browser.wait_until("document.querySelector('.card')?.innerText.includes('tokens/s')")
    assert "of 1000000" in browser.evaluate("document.querySelector('.card dl').innerText")

    section(browser, "charts")
    browser.wait_until("document.querySelectorAll('figure svg path').length > 10")
    steps = int(browser.evaluate("parseInt(document.title)"))
    browser.wait_until(f"parseInt(document.title) > {steps}")
    titles = browser.evaluate("[...document.querySelectorAll('figure h3')].map((each) => each.textContent)")
    assert {"Reward", "Response length", "Loss", "Staleness", "Tokens by outcome", "Idle share"} <= set(titles)
    assert not [title for title in titles if "/" in title], "metrics without a chart are drawn once they are wanted"
    browser.evaluate("document.querySelector('details summary').click()")
    browser.wait_until(f"document.querySelectorAll('figure svg').length > {len(titles)}")

    section(browser, "processes")
    browser.wait_until("document.querySelector('td')?.textContent === 'shaper/0'")
    run.kill("generator/0")
    section(browser, "events")
    browser.wait_until("document.body.innerText.includes('code -9')")


def watch_its_end(browser: Chromium, run: LaunchedRun) -> None:
    """The end is told, and its samples are shown."""
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.output
    section(browser, "overview")
    browser.wait_until("document.querySelector('.card .status').textContent === 'stopped'")
    section(browser, "samples")
    browser.wait_until("document.querySelectorAll('.bars button').length >= 6")
    assert browser.complaints() == []


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs in which every text that a model, a data set or a library may have written would be markup."""
    directory = tmp_path / "runs"
    directory.mkdir()
    for number, name in enumerate(("plain", "<b onclick=x>bold")):
        run_dir = directory / name
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(f"name: '{HOSTILE}'\n".replace("'taken'", "taken"))
        write_record(run_dir, RunRecord("failed", HOSTILE, 5.0 + number, 9.0, 2))
        metrics = [
            {"type": "step", "step": step, "elapsed_s": step, "reward/pool_mean": step / 9, HOSTILE: 1.0 * step}
            | {"rewards/format/mean": 0.5, "rewards/sums/mean": 0.25}
            | {f"tokens/{outcome}": 100.0 * step for outcome in ("trained", "cancelled")}
            for step in range(9)
        ]
        evaluation = {"type": "evaluation", "policy_version": 4, "elapsed_s": 4, "reward/mean": 0.5, HOSTILE: HOSTILE}
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (*metrics, evaluation)))
        event = {"type": "ended", "process": HOSTILE, "code": 1, "elapsed_s": 3.0, "reason": HOSTILE}
        (run_dir / "events.jsonl").write_text(json.dumps(event) + "\n")
        write(run_dir, group_of_samples())
    return directory


def group_of_samples() -> list[object]:
    tokens = ["2", HOSTILE, "", "\n", "4"]
    given = {"step": 3, "prompt": HOSTILE, "answer": HOSTILE, "metadata": {HOSTILE: HOSTILE}, "model_input": HOSTILE}
    whole = {"tokens": tokens, "logprobs": [-0.1, -4.0, 0.0, -1.0, -0.2], "versions": [1, 1, 2, 2, 3]}
    whole["token_ids"] = [1, 2, 3, 4, 5]
    return [
        rollout("7/0", text="".join(tokens), length=5, reward=1.0, **given, **whole),
        rollout("7/1", text=HOSTILE, length=90, outcome="cancelled", why=HOSTILE, **given),
        rollout("7/2", text=HOSTILE, length=40, reward=0.0, **given),
    ]


@pytest.fixture
def server(runs: Path) -> Iterator[DashboardServer]:
    serving = DashboardServer(ShownRuns.at(runs))
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield serving
    serving.shutdown()
    serving.close()
    thread.join(20.0)


def test_what_others_have_written_is_text_wherever_it_is_shown(browser: Chromium, server: DashboardServer) -> None:
    browser.open(server.url)
    names = ("plain", "<b onclick=x>bold")
    seen = {
        "overview": "failed: ",
        "charts": "further metrics",
        "evaluations": "version",
        "processes": "Starts and ends",
        "events": "ended",
        "samples": "group 7",
    }
    browser.wait_until("document.querySelectorAll('#runs button').length === 2")
    for name, words in seen.items():
        section(browser, name, *reversed(names))
        browser.wait_until(f"document.querySelector('main').innerText.includes({json.dumps(words)})")
        if name == "charts":
            browser.wait_until("document.querySelector('main').innerText.includes('Reward functions')")
            assert "sums" in browser.evaluate("document.querySelectorAll('figure')[1].innerText")
        elif name != "samples":
            browser.wait_until(f"document.querySelector('main').innerText.includes({json.dumps(SHOWN)})")
    browser.wait_until("document.querySelectorAll('.bars button').length === 3")
    assert browser.evaluate(f"document.querySelector('.prompt').textContent === {json.dumps(SHOWN)}")
    assert "bold" in browser.evaluate("document.getElementById('runs').innerText")
    assert number_of(browser, "img[src='x'], main script, body b b, [onclick], [onerror]") == 0
    assert "taken" not in browser.evaluate("document.title")
    assert browser.complaints() == []


def test_a_click_on_a_bar_shows_its_tokens_shaded(browser: Chromium, server: DashboardServer) -> None:
    browser.open(server.url)
    browser.wait_until("document.querySelectorAll('#runs button').length === 2")
    section(browser, "samples", "plain")
    browser.wait_until("document.querySelectorAll('.bars button').length === 3")
    bars = browser.evaluate("[...document.querySelectorAll('.bars button')].map((bar) => bar.title)")
    assert [words.partition(":")[0] for words in bars] == ["7/0", "7/2", "7/1"], "from the shortest to the longest"
    heights = browser.evaluate("[...document.querySelectorAll('.bars .body')].map((bar) => bar.offsetHeight)")
    assert heights == sorted(heights)
    colours = "[...document.querySelectorAll('.bars .body')].map((bar) => getComputedStyle(bar).backgroundColor)"
    assert len(set(browser.evaluate(colours))) == 3, "high, low and no reward"

    browser.evaluate("document.querySelector('.bars button').click()")
    browser.wait_until("document.querySelector('dialog').open")
    assert browser.evaluate("document.querySelector('.tokens').textContent") == f"2{SHOWN}\n4"
    assert "log-probability -4 · version 1 · token 2" in browser.evaluate(
        "document.querySelectorAll('.tokens span')[1].title"
    )
    shades = "[...document.querySelectorAll('.tokens span')].map((span) => getComputedStyle(span).backgroundColor)"
    by_logprob = browser.evaluate(shades)
    assert len(set(by_logprob)) == 5
    choose = "(() => { const shade = document.getElementById('shade'); shade.value = 'version';"
    browser.evaluate(f"{choose} shade.dispatchEvent(new Event('change')); }})()")
    by_version = browser.evaluate(shades)
    assert (by_version[0] == by_version[1], by_version[1] == by_version[2], len(set(by_version))) == (True, False, 3)
    browser.evaluate("document.querySelectorAll('dialog button')[1].click()")
    browser.wait_until("document.querySelector('dialog dd').textContent === '7/2'")
    assert browser.evaluate("document.querySelector('.tokens').textContent") == SHOWN, "its tokens were not kept"
    assert number_of(browser, "img[src='x'], dialog script") == 0
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_every_width_in_both_schemes(
    browser: Chromium, server: DashboardServer, tmp_path: Path, width: int, dark: bool
) -> None:
    browser.look(width, dark=dark)
    browser.open(server.url)
    browser.wait_until("document.querySelectorAll('#runs button').length === 2")
    for name, there in (("overview", ".card dd"), ("charts", "figure path"), ("samples", ".bars button")):
        section(browser, name, "plain")
        browser.wait_until(f"document.querySelectorAll('{there}').length > 2")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, name
        assert len(browser.picture(tmp_path / f"{name}.png")) > PICTURE_BYTES
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)))
    assert (brightness < 200) == dark
    assert browser.complaints() == []
