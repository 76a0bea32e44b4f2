"""The file that `init` writes: the settings with their defaults and docstrings, each section once."""

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from darts_async.config import RunConfig

_WIDTH = 100
_HEAD = """\
# A run of darts_async: the settings with their defaults. You may delete every line that you do not change.
#
#   darts-launch validate THIS_FILE    only look for mistakes
#   darts-launch --dry-run THIS_FILE   show what would be started
#   darts-launch THIS_FILE             run it
"""


def run_template() -> str:
    """The text of the file. It reads back as `RunConfig()`."""
    return "\n".join([_HEAD, *_section(RunConfig(), 0)]) + "\n"


def _section(section: BaseModel, depth: int) -> Iterator[str]:
    indent = "  " * depth
    written: dict[type, str] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if type(value) in written:
            changed = ", ".join(f"{key}: {_scalar(getattr(value, key))}" for key in list(type(value).model_fields)[:2])
            yield f"{indent}{name}: {{{changed}}}  # and the other settings of `{written[type(value)]}`"
            continue
        if depth == 0 and isinstance(value, BaseModel):
            yield ""
        yield from _comment(_meaning(value, info), indent)
        if isinstance(value, BaseModel):
            written[type(value)] = name
            yield f"{indent}{name}:"
            yield from _section(value, depth + 1)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            yield from _commented([f"{name}:", "  -", *_section(value[0], 2)], indent)
        else:
            yield f"{indent}{name}: {_scalar(section.model_dump(mode='json')[name])}"
            yield from _inner_section(info, indent)


def _inner_section(info: FieldInfo, indent: str) -> Iterator[str]:
    """A section that is absent by default is shown as comments."""
    for kind in get_args(info.annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel) and info.default is None:
            yield from _commented(_section(kind(), 1), indent)


def _commented(lines: Iterable[str], indent: str) -> Iterator[str]:
    for line in lines:
        yield f"{indent}# {line}".rstrip()


def _meaning(value: object, info: FieldInfo) -> str:
    if info.description:
        return info.description
    return (type(value).__doc__ or "") if isinstance(value, BaseModel) else ""


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(" ".join(text.split()), _WIDTH - len(indent)):
        yield f"{indent}# {line}"


def _scalar(value: Any) -> str:
    """On one line, as YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
