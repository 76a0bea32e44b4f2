"""Whether the reward function of a run can be loaded. One of the user's is loaded by a child (see `reward_trial`)."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator

from darts_async.config import RunConfig
from darts_async.errors import RewardError
from darts_async.machine.lifetime import PARENT_PID_VARIABLE
from darts_async.machine.spawn import module_command, signal_name
from darts_async.reward.loading import BUILT_IN, load_function
from launcher.problems import Problem, shown


def check_reward(config: RunConfig) -> Iterator[Problem]:
    """The reward function can be imported and called."""
    name = config.reward.function
    is_of_user = name not in BUILT_IN and all(name.partition(":"))
    fault = _fault_in_a_child(name, config.reward.start_deadline_s) if is_of_user else _fault_here(name)
    if fault is not None:
        yield Problem("reward.function", fault, shown(name))


def _fault_here(name: str) -> str | None:
    try:
        load_function(name)
    except RewardError as error:
        return str(error)
    return None


def _fault_in_a_child(name: str, deadline_s: float) -> str | None:
    module = name.partition(":")[0]
    child = subprocess.Popen(
        module_command("launcher.preflight.reward_trial", name),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, PARENT_PID_VARIABLE: str(os.getpid())},
        start_new_session=True,
    )
    try:
        output, errors = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return f"importing {module!r} took longer than reward.start_deadline_s ({deadline_s:g} s)"
    finally:
        _end(child)
    if not output:
        last = (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        how = f"exit code {child.returncode}" if child.returncode >= 0 else signal_name(-child.returncode)
        return f"importing {module!r} ended the process ({how}): {last}"
    fault: str | None = json.loads(output)
    return fault


def _end(child: subprocess.Popen[bytes]) -> None:
    """The child, and what the module has started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
