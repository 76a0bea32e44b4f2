"""Whether what a run brings itself can be loaded, and does what it is for. A child looks at it (`extension_trial`)."""

import uuid
from collections.abc import Iterator
from dataclasses import replace

import msgspec

from darts_async.config import RunConfig
from darts_async.errors import ExtensionError
from darts_async.extensions import KINDS, PROMPTS, REWARD, SINK, Kind, load
from darts_async.machine.trial_process import TrialError, trial_process
from darts_async.reward.descendants import kill_marked
from launcher.preflight.extension_trial import Question
from launcher.preflight.prompt_check import Found, look_at_prompts
from launcher.preflight.prompt_figures import PromptFigures
from launcher.preflight.reward_trial import doubts, try_reward
from launcher.problems import Problem, shown

_MARK = "DARTS_TRIAL"
"""An environment variable of a trial and its descendants, with a unique value."""
_DEADLINE_S = 300.0
"""For one that imports torch on a busy machine, or makes a data set."""


def check_extensions(config: RunConfig, figures: PromptFigures | None = None) -> Iterator[Found]:
    """Everything that a setting names as `module:name` can be imported and called. (For prompts: `check_prompts`.)
    Reward functions are called with the first prompt, if there are `figures`."""
    yield Found(tuple(check_sinks(config)))
    for kind in KINDS.values():
        own = config.own_rewards if kind is REWARD else ()
        for name in (*kind.names_in(config), *own) if kind not in (PROMPTS, SINK) else ():
            sample = figures if figures is not None and figures.is_scored_by(kind, name, config) else None
            if kind.is_of_user(name):
                yield _try_in_a_child(kind, name, config, sample)
            elif name not in kind.built_in or sample is not None:
                yield _try_here(kind, name, sample)


def check_sinks(config: RunConfig) -> Iterator[Problem]:
    """Each sink can be made. All in a child, because the packages of services have effects when they are imported."""
    for name in SINK.names_in(config):
        for problem in _try_in_a_child(SINK, name, config).problems:
            yield replace(problem, here=True) if name in SINK.built_in else problem


def check_prompts(config: RunConfig) -> Found:
    """What `look_at_prompts` finds; a source of the user's is called in a child."""
    sources = [section.source for section in config.record_sections.values()]
    of_user = next((source for source in sources if PROMPTS.is_of_user(source)), None)
    return look_at_prompts(config) if of_user is None else _try_in_a_child(PROMPTS, of_user, config)


def _try_here(kind: Kind, name: str, figures: PromptFigures | None) -> Found:
    try:
        function = load(kind, name)
    except ExtensionError as error:
        return _failed(kind, name, str(error))
    if figures is None:
        return Found()
    trial = try_reward(name, function, figures)
    return Found(tuple(doubts(kind, trial)), reward=trial)


def _try_in_a_child(kind: Kind, name: str, config: RunConfig, figures: PromptFigures | None = None) -> Found:
    is_reward = kind.setting.startswith("reward.")
    deadline_s = config.reward.start_deadline_s if is_reward else _DEADLINE_S
    module, question = name.partition(":")[0], Question(kind.setting, name, config.model_dump_json(), figures)
    mark = uuid.uuid4().hex
    try:
        with trial_process("launcher.preflight.extension_trial", question, **{_MARK: mark}) as child:
            return msgspec.json.decode(child.answer(deadline_s), type=Found)
    except TimeoutError:
        limit = f"{'reward.start_deadline_s (' if is_reward else '('}{deadline_s:g} s)"
        return _failed(kind, name, f"importing {module!r} and trying it out took longer than {limit}")
    except TrialError as error:
        return _failed(kind, name, f"importing {module!r} and trying it out ended the process {error}")
    finally:
        kill_marked(_MARK, mark)  # what the function has started in other sessions


def _failed(kind: Kind, name: str, fault: str) -> Found:
    return Found((Problem(kind.setting, fault, shown(name)),))
