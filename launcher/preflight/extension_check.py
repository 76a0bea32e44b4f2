"""Whether what a run brings itself can be loaded, and does what it is for. A child looks at it (`extension_trial`)."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import msgspec

from darts_async.config import RunConfig
from darts_async.errors import ExtensionError
from darts_async.extensions import KINDS, PROMPTS, REWARD, SINK, Kind, load
from darts_async.machine.lifetime import PARENT_PID_VARIABLE
from darts_async.machine.spawn import module_command, signal_name
from launcher.preflight.extension_trial import Question
from launcher.preflight.prompt_check import Found, look_at_prompts
from launcher.problems import Problem, shown

_DEADLINE_S = 300.0
"""For one that imports torch on a busy machine, or makes a data set."""


def check_extensions(config: RunConfig) -> Iterator[Problem]:
    """Everything that a setting names as `module:name` can be imported and called. (For prompts: `check_prompts`.)"""
    yield from check_sinks(config)
    for kind in KINDS.values():
        for name in kind.names_in(config) if kind not in (PROMPTS, SINK) else ():
            if kind.is_of_user(name):
                yield from _try_in_a_child(kind, name, config).problems
            elif name not in kind.built_in:
                yield from _faults_here(kind, name)


def check_sinks(config: RunConfig) -> Iterator[Problem]:
    """Each sink can be made. All in a child, because the packages of services have effects when they are imported."""
    for name in SINK.names_in(config):
        for problem in _try_in_a_child(SINK, name, config).problems:
            yield replace(problem, here=True) if name in SINK.built_in else problem


def check_prompts(config: RunConfig) -> Found:
    """What `look_at_prompts` finds; a source of the user's is called in a child."""
    source = config.prompts.source
    return _try_in_a_child(PROMPTS, source, config) if PROMPTS.is_of_user(source) else look_at_prompts(config)


def _faults_here(kind: Kind, name: str) -> Iterator[Problem]:
    try:
        load(kind, name)
    except ExtensionError as error:
        yield Problem(kind.setting, str(error), shown(name))


def _try_in_a_child(kind: Kind, name: str, config: RunConfig) -> Found:
    child = subprocess.Popen(
        module_command("launcher.preflight.extension_trial"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, PARENT_PID_VARIABLE: str(os.getpid())},
        start_new_session=True,
    )
    deadline_s = config.reward.start_deadline_s if kind is REWARD else _DEADLINE_S
    module, question = name.partition(":")[0], Question(kind.setting, name, config.model_dump_json())
    try:
        output, errors = child.communicate(msgspec.json.encode(question), timeout=deadline_s)
    except subprocess.TimeoutExpired:
        limit = f"{'reward.start_deadline_s (' if kind is REWARD else '('}{deadline_s:g} s)"
        return _failed(kind, name, f"importing {module!r} took longer than {limit}")
    finally:
        _end(child)
    if not output:
        last = (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        how = f"exit code {child.returncode}" if child.returncode >= 0 else signal_name(-child.returncode)
        return _failed(kind, name, f"importing {module!r} ended the process ({how}): {last}")
    return msgspec.json.decode(output, type=Found)


def _failed(kind: Kind, name: str, fault: str) -> Found:
    return Found((Problem(kind.setting, fault, shown(name)),))


def _end(child: subprocess.Popen[bytes]) -> None:
    """The child, and what the module has started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
