"""The names in the directory of a run.

A file that is rewritten is replaced atomically, so a reader sees the old one or the new one, also after a power loss. A
file that grows is on the disk about a second after a write.

Logs, traces, rollouts, journal and checkpoints are bounded by `telemetry.log_max_mb`, `telemetry.trace_max_mb`,
`telemetry.samples_max_mb`, the samples in flight and `learner.keep_checkpoints`. Three files grow with the run:
`ledger.msgpack` by less than 100 bytes a sample, `metrics.jsonl` by about 2 KB a step, `events.jsonl` with each start
and end of a process. So ten million samples, of which 256 are trained on in a step, are 1 GB of ledger and 80 MB of
metrics. A shaper that continues a run needs 130 bytes a sample in memory; `audit` and `report` need about 1 KB.
"""

from pathlib import Path
from typing import Final

CONFIG_FILE: Final = "config.yaml"
"""The resolved settings, every default written out."""
BEGUN_FILE: Final = "config.begun.yaml"
"""The same as the last life began with it."""
PLAN_FILE: Final = "plan.json"
"""Processes and links."""
NODES_DIR: Final = "nodes"
"""Of each node: pid and start time of its keeper, its agent and its processes."""
STATE_FILE: Final = "state.json"
"""Whether the run is running, finished, stopped or failed, and why."""
LOCK_FILE: Final = "run.lock"
"""Held by the launcher of the run."""
METRICS_FILE: Final = "metrics.jsonl"
"""One line per optimiser step or evaluation; lines of one step belong together; `resumed` where another life of the run
begins."""
EVENTS_FILE: Final = "events.jsonl"
"""One line for each process that started, ended, was found hanging or serves again."""
SINKS_DIR: Final = "sinks"
"""Of each sink, how many lines of the metrics it has taken."""
CONTROL_SOCKET: Final = "control.sock"
"""Where the running launcher takes requests; only the owner of the directory gets there."""
SUMMARY_FILE: Final = "summary.json"
"""The totals."""
KEYS_DIR: Final = "keys"
"""One key pair per process."""
LEDGER_FILE: Final = "ledger.msgpack"
"""What became of each sample."""
JOURNAL_FILE: Final = "shaper.journal"
"""What the shaper knows, and everything that has happened to it since."""
CHECKPOINTS_DIR: Final = "checkpoints"
"""What the learner comes back with."""
SHAPER_STATE_FILE: Final = "shaper.state"
"""What the shaper knew, in a checkpoint."""
LOGS_DIR: Final = "logs"
"""What each process printed, and its structured log; NAME.old.* is what was before."""
TRACE_DIR: Final = "trace"
"""What each process did and when: see `darts_async.trace`."""
TRACE_FILE: Final = "trace.json"
"""The same for Perfetto, once `darts-launch trace` has been called."""
SAMPLES_DIR: Final = "samples"
"""Rollouts to be looked at: see `darts_async.rollouts`."""
MODEL_DIR: Final = "model"
"""The trained model, at the end."""


def file_stem(process: str) -> str:
    """A process name as part of a file name.

    >>> file_stem("generator/0")
    'generator-0'
    """
    return process.replace("/", "-")


def log_path(logs_dir: Path, process: str) -> Path:
    """The structured log of a process."""
    return logs_dir / f"{file_stem(process)}.jsonl"


def output_path(logs_dir: Path, process: str) -> Path:
    """What a process prints beside that."""
    return logs_dir / f"{file_stem(process)}.out"


def older_path(path: Path) -> Path:
    """Where a log or a trace goes when it is full."""
    return path.with_suffix(f".old{path.suffix}")
