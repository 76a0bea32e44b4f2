"""Reads the limits on lengths from the configuration of a model, without torch.

A *bound* is a number of tokens that no sample may exceed. One bound is the number of positions of a model. Two kinds of
rotary frequencies give another one: `dynamic` and `longrope` frequencies change with the longest sequence of a call.
Then the log-probability of a token depends on other samples of the call and on later tokens, so engine and learner
cannot agree. Below the bound the frequencies are constant.

A *threshold* is a number of tokens beyond which the layers of a model may behave differently: a window, a chunk, a
scale of positions. A trial shows whether engine and learner are right beyond it (see `miniature`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

_POSITIONS = ("max_position_embeddings", "n_positions")
_THRESHOLDS = re.compile(r"window|chunk|local|block_size|floor_scale|original_max|index_topk")
_NOT_TOKENS = re.compile(r"pattern|layers?$|experts|heads|theta|freq|mamba|conv")
_SECTIONS = ("rope_parameters", "rope_scaling")
_FREQUENCIES = {"dynamic": "dynamic", "longrope": "longrope", "su": "longrope"}
"""Rotary frequencies that change with the length; `su` is an older name of the second kind."""


class Lengths(NamedTuple):
    """The longest that a process runs a model on, in tokens."""

    sample: int
    """Prompt and response."""
    row: int
    """Tokens of all samples in one call."""


class Bound(NamedTuple):
    """The most tokens of a sample, and why."""

    setting: str
    """Of the model's configuration."""
    value: int
    reason: str


class Threshold(NamedTuple):
    """A number of tokens that a setting of the model names."""

    path: tuple[str, ...]
    """Keys of the model's configuration, from the outermost on."""
    value: int

    @property
    def setting(self) -> str:
        return ".".join(self.path)


def text_part(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that describes the language model."""
    inner = described.get("text_config")
    return inner if isinstance(inner, dict) else described


def bounds(described: Mapping[str, Any]) -> list[Bound]:
    """All bounds, the smallest first.

    >>> [bound.value for bound in bounds({"max_position_embeddings": 64})]
    [64]
    """
    text = text_part(described)
    return sorted([*_frequencies(text), *_positions(text)], key=lambda bound: bound.value)


def why_too_long(described: Mapping[str, Any], num_tokens: int) -> str | None:
    """Why samples of this many tokens are too long for the model, with a fix; None if they are not."""
    for setting, value, reason in bounds(described):
        if num_tokens > value:
            return (
                f"generator.max_context_tokens is {num_tokens}, but {reason} ({setting}); lower it to {value} or less, "
                "and with it prompts.max_prompt_tokens or sampling.max_new_tokens"
            )
    return None


def thresholds(described: Mapping[str, Any]) -> list[Threshold]:
    """All thresholds, those of nested sections too."""
    return [*_thresholds(text_part(described), ())]


def described_by(crossed: Sequence[Threshold]) -> tuple[str, int]:
    """The settings of thresholds that fail together, and the most tokens that do not exceed all of them. The thresholds
    that so many tokens exceed were tried before: see `crossed`."""
    return " and ".join(threshold.setting for threshold in crossed), max(threshold.value for threshold in crossed)


def _positions(text: Mapping[str, Any]) -> Iterator[Bound]:
    for setting in _POSITIONS:
        if _is_count(value := text.get(setting)):
            yield Bound(setting, value, f"the model was made for {value} tokens")


def _frequencies(text: Mapping[str, Any]) -> Iterator[Bound]:
    for section in _SECTIONS:
        for rope in _ropes(text.get(section)):
            kind = _FREQUENCIES.get(str(rope.get("rope_type", rope.get("type"))))
            setting = "max_position_embeddings" if kind == "dynamic" else "original_max_position_embeddings"
            value = text.get(setting, rope.get(setting, text.get("max_position_embeddings")))
            if kind is not None and _is_count(value):
                what = f"its {kind} rotary frequencies change with the longest sample of a call from {value + 1} tokens"
                yield Bound(setting, value, what)


def _ropes(section: object) -> list[dict[str, Any]]:
    """One set of frequencies, or one for each type of layer."""
    if not isinstance(section, dict):
        return []
    return [section, *(inner for inner in section.values() if isinstance(inner, dict))]


def _thresholds(section: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Threshold]:
    for name, value in section.items():
        if isinstance(value, dict) and (path or name in _SECTIONS):
            yield from _thresholds(value, (*path, name))
        elif _is_count(value) and value > 1 and _THRESHOLDS.search(name) and not _NOT_TOKENS.search(name):
            yield Threshold((*path, name), value)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
