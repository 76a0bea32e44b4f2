"""What does a restart by hand cost a run that goes on?

    python -m bench.restart [--repeats 5] [--generators 4] [--out FILE.md] [--plot FILE.png]

One run with scripted engines that decode slowly, so that they and not the CPUs are the limit: their slots are always
full, and each is 1/N of the tokens per second. `darts-launch restart generator/0` is called from outside, again and
again, and the trace of the run says what was decoded: before; while generator/0 was gone, from the request until it
served again; and after. The dip is 1 - gone / before: 1/N if the others do not notice. `others` is their rate while it
was gone as a share of theirs before. At the end the run is stopped and audited.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import psutil

from bench.charts import for_plots
from bench.measured import tokens_between
from bench.results import conditions
from launcher.analysis.traces import Life, Traces
from tests.support.launched import LaunchedRun

VICTIM = "generator/0"
SETTLE_S, CALM_S, MARGIN_S = 12.0, 10.0, 2.0
"""Waited for before each restart; measured before and after it; left out around it (`darts-launch` itself starts)."""
NUM_SLOTS, TOKEN_LATENCY_S = 8, 0.04
_BIN_S = 0.5

ByProcess = Mapping[str, Sequence[Life]]


@dataclass(frozen=True, slots=True)
class Restart:
    """One of them. Rates are of all generators together, in tokens/s."""

    asked_s: float
    served_s: float
    before: float
    gone: float
    after: float
    others: float
    """While it was gone, as a share of before."""
    cpu_share: float
    """Of all cores, in use by anybody while it was gone."""

    @property
    def dip(self) -> float:
        """Share of the tokens that were missing."""
        return 1 - self.gone / self.before


def main() -> None:
    """Run, restart, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--generators", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=for_plots)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, LaunchedRun(Path(home), "scripted.yaml", settings(arguments)) as run:
        run.wait_for_steps(2)
        cpu_shares = [restart(run, number) for number in range(arguments.repeats)]
        time.sleep(CALM_S + MARGIN_S)
        stopped = run.verb("down")
        assert stopped.returncode == 0, stopped.stderr
        assert run.end() == 130, run.output
        run.assert_clean()
        traces = Traces(run.run_dir)
        lives = dict(traces.by_process())
    restarts = measure(lives, cpu_shares)
    text = table(arguments, restarts)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    if arguments.plot:
        draw(arguments.plot, lives, restarts, arguments.generators)


def settings(arguments: argparse.Namespace) -> dict[str, object]:
    """More groups open than the slots hold, and no end."""
    return {
        "roles": {"generator": {"replicas": arguments.generators}},
        "shaping": {"rule": "none", "launch": 8, "keep": 8},
        "staleness": {"max_staleness": 4},
        "generator": {
            "num_slots": NUM_SLOTS,
            "script": {"token_latency_s": TOKEN_LATENCY_S, "sample_sigma": 0.2, "prompt_sigma": 0.2},
        },
        "learner": {"steps": 100_000, "groups_per_step": arguments.generators, "checkpoint_every": 100_000},
        "evaluation": {"samples_per_prompt": 0},
        "telemetry": {"status_every_s": 0.1},
    }


def restart(run: LaunchedRun, number: int) -> float:
    """Restart it and wait until it serves. Returns the share of all cores that was in use meanwhile."""
    time.sleep(SETTLE_S + MARGIN_S)
    done = run.verb("restart", VICTIM)
    assert done.returncode == 0, done.stderr
    psutil.cpu_percent()
    run.wait_for_service(VICTIM, number + 2)
    return psutil.cpu_percent() / 100


def measure(lives: ByProcess, cpu_shares: Sequence[float]) -> list[Restart]:
    """The restarts of a run, from its traces."""
    [launcher] = lives["launcher"]
    asked_s = [each.at_s for each in launcher.instants if each.name == "restarted"]
    served_s = [each.at_s for each in launcher.instants if each.name == "serves"]
    others = {name: each for name, each in lives.items() if name != VICTIM}
    restarts = []
    for asked, served, cpu_share in zip(asked_s, served_s, cpu_shares, strict=True):
        calm = (asked - MARGIN_S - CALM_S, asked - MARGIN_S)
        restarts.append(
            Restart(
                asked_s=asked,
                served_s=served,
                before=rate(lives, *calm),
                gone=rate(lives, asked, served),
                after=rate(lives, served + MARGIN_S, served + MARGIN_S + CALM_S),
                others=rate(others, asked, served) / rate(others, *calm),
                cpu_share=cpu_share,
            )
        )
    return restarts


def rate(lives: ByProcess, since_s: float, until_s: float) -> float:
    """Tokens/s of all generators among these processes."""
    generators = [each for name, each in lives.items() if name.startswith("generator/")]
    return sum(tokens_between(each, since_s, until_s) for each in generators) / (until_s - since_s)


def table(arguments: argparse.Namespace, restarts: Sequence[Restart]) -> str:
    """The results as Markdown."""
    dips, share = [each.dip for each in restarts], 1 / arguments.generators
    lines = [
        conditions("restart"),
        "",
        f"| restart of {VICTIM} | gone | tokens/s before | while gone | after | dip | others | CPUs in use |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, each in enumerate(restarts, 1):
        lines.append(
            f"| {number} | {each.served_s - each.asked_s:.1f} s | {each.before:.0f} | {each.gone:.0f} "
            f"| {each.after:.0f} | {each.dip:.1%} | {each.others:.1%} | {each.cpu_share:.0%} |"
        )
    lines += [
        "",
        f"Dip: mean {mean(dips):.1%}, median {median(dips):.1%}, {min(dips):.1%} to {max(dips):.1%}; one generator of "
        f"{arguments.generators} is {share:.1%}. Afterwards: {mean(e.after / e.before for e in restarts):.1%} of "
        f"before. Gone: {median(e.served_s - e.asked_s for e in restarts):.1f} s in the median. "
        "`darts-launch audit`: nothing lost, nothing trained twice, nothing over-stale.",
    ]
    return "\n".join(lines) + "\n"


def draw(path: Path, lives: ByProcess, restarts: Sequence[Restart], num_generators: int) -> None:
    """Tokens/s around each restart, as a share of before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4))
    away_s = median(each.served_s - each.asked_s for each in restarts)
    edges = [-CALM_S + _BIN_S * number for number in range(int((2 * CALM_S + away_s) / _BIN_S))]
    for number, each in enumerate(restarts):
        shares = [rate(lives, each.asked_s + at, each.asked_s + at + _BIN_S) / each.before for at in edges]
        axis.stairs(shares, [*edges, edges[-1] + _BIN_S], baseline=None, color=f"C{number}", linewidth=1.1)
    axis.axhline(1 - 1 / num_generators, color="0.25", linestyle="--", linewidth=1)
    axis.annotate(f"1 - 1/{num_generators}", (edges[0], 1 - 1 / num_generators), va="bottom", fontsize=9)
    axis.axvspan(0, away_s, color="0.92", zorder=0, label=f"generator/0 is gone (median {away_s:.1f} s)")
    axis.set(xlabel="seconds since the restart was asked for", ylabel="tokens/s, share of before", ylim=(0, 1.2))
    axis.legend(loc="lower right", frameon=False, fontsize=9)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
