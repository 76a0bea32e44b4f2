"""Whether what a run brings itself can be loaded, and does what it is for. A child looks at it (`extension_trial`)."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator

from darts_async.config import RunConfig
from darts_async.errors import ExtensionError
from darts_async.extensions import KINDS, PROMPTS, REWARD, Kind, load
from darts_async.machine.lifetime import PARENT_PID_VARIABLE
from darts_async.machine.spawn import module_command, signal_name
from darts_async.prompts.load import PromptCounts
from launcher.problems import Problem, shown

_DEADLINE_S = 300.0
"""For one that imports torch on a busy machine, or makes a data set."""


def check_extensions(config: RunConfig) -> Iterator[Problem]:
    """Everything that a setting names as `module:name` can be imported and called. (Of prompts see `ask_source`.)"""
    for kind in KINDS.values():
        for name in kind.names_in(config):
            if name in kind.built_in or kind is PROMPTS:
                continue
            fault = _try_in_a_child(kind, name, config)[0] if kind.is_of_user(name) else _fault_here(kind, name)
            if fault is not None:
                yield Problem(kind.setting, fault, shown(name))


def ask_source(config: RunConfig) -> PromptCounts | Problem:
    """What a source of the user's gives, as far as its prompts can be used."""
    fault, counts = _try_in_a_child(PROMPTS, config.prompts.source, config)
    return PromptCounts(*counts) if fault is None else Problem(PROMPTS.setting, fault, shown(config.prompts.source))


def _fault_here(kind: Kind, name: str) -> str | None:
    try:
        load(kind, name)
    except ExtensionError as error:
        return str(error)
    return None


def _try_in_a_child(kind: Kind, name: str, config: RunConfig) -> tuple[str | None, list[int]]:
    """What is wrong, if anything is; of a source that can be used, the numbers of its `PromptCounts`."""
    module, deadline_s = name.partition(":")[0], config.reward.start_deadline_s if kind is REWARD else _DEADLINE_S
    child = subprocess.Popen(
        module_command("launcher.preflight.extension_trial", kind.setting, name, config.model_dump_json()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, PARENT_PID_VARIABLE: str(os.getpid())},
        start_new_session=True,
    )
    try:
        output, errors = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        limit = f"{'reward.start_deadline_s (' if kind is REWARD else '('}{deadline_s:g} s)"
        return f"importing {module!r} took longer than {limit}", []
    finally:
        _end(child)
    if not output:
        last = (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        how = f"exit code {child.returncode}" if child.returncode >= 0 else signal_name(-child.returncode)
        return f"importing {module!r} ended the process ({how}): {last}", []
    fault, counts = json.loads(output)
    return fault, counts


def _end(child: subprocess.Popen[bytes]) -> None:
    """The child, and what the module has started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
