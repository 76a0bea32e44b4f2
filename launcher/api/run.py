"""`run`: one call that does what `darts-launch FILE.yaml NAME=VALUE...` does.

The launcher is a process of its own, so a notebook's event loop, signals and imports do not meet those of the run. It
ends with the calling process.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec
import yaml

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.machine.lifetime import PARENT_PID_VARIABLE
from darts_async.machine.spawn import module_command
from darts_async.topology.run_files import METRICS_FILE, STATE_FILE
from launcher.api.callable_reward import FUNCTION, SOCKET_VARIABLE, RewardFunction, served
from launcher.api.result import Result, RunFailedError, StepLines, read_result
from launcher.config_file import load_config
from launcher.run_dir.json_lines import read_lines
from launcher.run_dir.run_dir import read_record
from launcher.settings_tree import Overrides

_POLL_S = 0.1
_STOP_WITHIN_S = 120.0
"""Time for an orderly stop after an interrupt. Then the launcher is killed, and with it everything on its node."""
_BAD_INPUT = 2
_KEPT_LINES = 200

Settings = str | Path | Mapping[str, Any]
Prompts = Iterable[str | Mapping[str, Any]]


def run(
    settings: Settings,
    overrides: Mapping[str, Any] | None = None,
    *,
    reward: RewardFunction | None = None,
    prompts: Prompts | None = None,
    on_step: Callable[[int, Mapping[str, float]], object] | None = None,
    on_evaluation: Callable[[Mapping[str, Any]], object] | None = None,
    show: Callable[[str], object] | None = print,
) -> Result:
    """Carry a run out, and return when it is over.

    Args:
        settings: the path of a YAML file, or the same settings as a mapping.
        overrides: settings that replace those, by dotted name: `{"learner.steps": 200}`.
        reward: a function as `reward.function` names one, in this process: a closure or a function of a notebook will
            do. Several threads call it at once, with the keywords `prompt`, `response`, `answer`, `metadata` and
            `finish_reason`.
        prompts: records with the fields `prompt` and `answer`, and any others; or texts, which have no answer. They are
            written to a file in `runs_dir`.
        on_step: called with the number and the metrics of each optimiser step, in order.
        on_evaluation: called with the metrics of each evaluation on held-out prompts.
        show: called with each line that the launcher prints; None for silence.

    An exception of a callback, and Ctrl-C, stop the run in order and are raised again. The result of a stopped run has
    the status `stopped`.

    Raises:
        ConfigError: the settings cannot be run. The text is that of `darts-launch`.
        RunFailedError: the run failed. The error has the result so far.

    Example:
        >>> from launcher.api import run
        >>> result = run(
        ...     {"learner": {"steps": 20}},
        ...     reward=lambda response, answer, **_: float(response.endswith(answer)),
        ...     prompts=[{"prompt": "2 +4 +8 =", "answer": "4"}, {"prompt": "7 +5 =", "answer": "2"}],
        ... )  # doctest: +SKIP
    """
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="darts-")))
        values, environment = dict(overrides or {}), dict[str, str]()
        file = _file_of(settings, home)
        if prompts is not None:
            runs_dir = load_config(file, Overrides(words=_words(values))).runs_path
            values |= {"prompts.source": "jsonl", "prompts.path": str(_written(prompts, runs_dir))}
        if reward is not None:
            values["reward.function"] = FUNCTION
            environment[SOCKET_VARIABLE] = str(stack.enter_context(served(reward)))
        runs_dir = load_config(file, Overrides(words=_words(values))).runs_path
        launcher = stack.enter_context(_launched([str(file), *_words(values)], environment, show))
        return launcher.follow(runs_dir, _Callbacks(on_step, on_evaluation))


def _file_of(settings: Settings, home: Path) -> Path:
    if not isinstance(settings, Mapping):
        return Path(settings)
    file = home / "settings.yaml"
    file.write_text(yaml.safe_dump({"name": RunConfig().name} | dict(settings), allow_unicode=True))
    return file


def _words(overrides: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name}={_in_yaml(value)}" for name, value in overrides.items())


def _in_yaml(value: Any) -> str:
    """On one line. Paths become texts."""
    plain = json.loads(json.dumps(value, default=str))
    return yaml.safe_dump(plain, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


def _written(prompts: Prompts, runs_dir: Path) -> Path:
    """A file of records, named by its contents: a run that is resumed finds its prompts again."""
    records = ({"prompt": each, "answer": ""} if isinstance(each, str) else dict(each) for each in prompts)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path = (runs_dir / f"prompts-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl").absolute()
    runs_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class _Callbacks:
    """Hears of steps and evaluations as they are written."""

    def __init__(
        self,
        on_step: Callable[[int, Mapping[str, float]], object] | None,
        on_evaluation: Callable[[Mapping[str, Any]], object] | None,
    ) -> None:
        self._on_step, self._on_evaluation = on_step, on_evaluation
        self._lines = StepLines()
        self._num_bytes = 0
        self._num_evaluations = 0

    def look(self, run_dir: Path, *, is_over: bool) -> None:
        """Read what is new."""
        if self._on_step is None and self._on_evaluation is None:
            return
        new_lines = read_lines(run_dir / METRICS_FILE, self._num_bytes)
        self._num_bytes = new_lines.num_bytes
        for line in new_lines.objects:
            self._lines.add(line)
        evaluations = list(self._lines.evaluations.values())
        new, self._num_evaluations = evaluations[self._num_evaluations :], len(evaluations)
        for evaluation in new:
            if self._on_evaluation is not None:
                self._on_evaluation(evaluation)
        for step in self._lines.take_complete(is_over=is_over):
            if self._on_step is not None:
                self._on_step(step, self._lines.steps[step])


class _Launcher:
    """The process of `darts-launch`."""

    def __init__(self, process: subprocess.Popen[str], output: "_Output") -> None:
        self._process = process
        self._output = output
        self._started_at_s = time.time()

    def follow(self, runs_dir: Path, callbacks: _Callbacks) -> Result:
        """Until the run is over. See `run`."""
        run_dir: Path | None = None
        try:
            while self._process.poll() is None:
                run_dir = run_dir or self._run_dir(runs_dir)
                if run_dir is not None:
                    callbacks.look(run_dir, is_over=False)
                self._output.raise_failure()
                time.sleep(_POLL_S)
        except BaseException:
            self.stop()
            raise
        self._output.join()
        self._output.raise_failure()
        run_dir = run_dir or self._run_dir(runs_dir)
        if run_dir is None or self._process.returncode == _BAD_INPUT:
            said = "\n".join(self._output.lines).strip()
            raise ConfigError(said or f"the launcher ended with {self._process.returncode}")
        callbacks.look(run_dir, is_over=True)
        result = read_result(run_dir)
        if result.status not in ("finished", "stopped"):
            raise RunFailedError(result)
        return result

    def stop(self) -> None:
        """Stop the run in order."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _run_dir(self, runs_dir: Path) -> Path | None:
        """The directory whose record names this launcher, and not an earlier one that had the same pid."""
        for path in runs_dir.glob(f"*/{STATE_FILE}"):
            with contextlib.suppress(OSError, UnicodeDecodeError, msgspec.DecodeError):
                record = read_record(path.parent)
                if record.launcher_pid == self._process.pid and record.started_at_s >= self._started_at_s - 1.0:
                    return path.parent
        return None


class _Output:
    """Reads the lines of the launcher in a thread, whatever `show` does: a launcher that cannot write would stop."""

    def __init__(self, file: IO[str], show: Callable[[str], object] | None) -> None:
        self.lines: list[str] = []
        """The last ones."""
        self._file = file
        self._show = show
        self._failure: Exception | None = None
        self._reading = threading.Thread(target=self._read, name="output of darts-launch", daemon=True)
        self._reading.start()

    def raise_failure(self) -> None:
        """Raise what `show` has raised."""
        if self._failure is not None:
            raise self._failure

    def join(self) -> None:
        """Wait for the last line."""
        self._reading.join()

    def _read(self) -> None:
        for line in self._file:
            self.lines.append(line.rstrip("\n"))
            del self.lines[:-_KEPT_LINES]
            if self._show is not None and self._failure is None:
                try:
                    self._show(self.lines[-1])
                except Exception as error:  # noqa: BLE001 - a user's function; `follow` raises it
                    self._failure = error


@contextlib.contextmanager
def _launched(
    words: list[str], environment: Mapping[str, str], show: Callable[[str], object] | None
) -> Iterator[_Launcher]:
    process = subprocess.Popen(
        module_command("launcher", "run", *words),
        env=os.environ | environment | {PARENT_PID_VARIABLE: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C of the terminal comes to this process alone, which passes it on once
    )
    assert process.stdout is not None
    output = _Output(process.stdout, show)
    launcher = _Launcher(process, output)
    try:
        yield launcher
    finally:
        launcher.stop()
        output.join()
        process.stdout.close()
