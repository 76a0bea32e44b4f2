"""Chat templates turn messages into the text that the model continues.

A template is a program that comes with the model, so it is rendered in jinja's sandbox. The environment is the one
that transformers documents for template authors (block trimming, loop controls, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`, `generation` blocks), and a template is given exactly the variables that transformers
gives it: `messages`, `tools` and `documents` (none, unless an argument sets them), `add_generation_prompt`, the special
tokens that the tokenizer's files name, and the arguments of the run. A test holds the renderings of dozens of public
templates equal. The template writes all special tokens: its output is tokenised without adding any.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from darts_async.errors import ConfigError, DataError, ModelError

ChatMessage = dict[str, Any]
"""One turn of a conversation, as the record has it: `role`, `content`, and whatever else the template may read."""
_RENDERING = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
ARGUMENTS_SETTING = "prompts.chat_template_arguments"


class ChatTemplate:
    """A compiled template, the special tokens it may name, and its constant arguments.

    Raises:
        ModelError: the template is not valid.
        ConfigError: it reads none of the arguments' names.

    Example:
        >>> template = ChatTemplate("{{ messages[0].content }}{{ ending }}", {}, "here", {"ending": "<think>"})
        >>> template.render([{"role": "user", "content": "1 + 1?"}])
        '1 + 1?<think>'
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], place: str, arguments: Mapping[str, Any] | None = None
    ) -> None:
        self._variables = {"tools": None, "documents": None, **special_tokens, **(arguments or {})}
        environment = _environment()
        try:
            self.names = jinja2.meta.find_undeclared_variables(environment.parse(source))
            """Every variable that the template reads."""
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template in {place} is not valid: {error} (line {error.lineno})") from error
        except RecursionError as error:
            raise ModelError(f"the chat template in {place} is not valid: it is nested too deeply") from error
        for name in arguments or {}:
            if name not in self.names:
                raise ConfigError(_unknown_argument(name, self.names, place))

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The conversation as text, up to where the assistant's turn begins.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._variables)
        except _RENDERING as error:
            # A template is a program, and may raise errors of Python as well as of jinja.
            raise DataError(f"the chat template refuses the conversation: {error}") from error


def _unknown_argument(name: str, names: set[str], place: str) -> str:
    readable = sorted(names - {"messages", "add_generation_prompt"})
    near = difflib.get_close_matches(name, readable, n=1)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    return f"{ARGUMENTS_SETTING} has {name!r}, but the chat template in {place} reads only {readable}{suggestion}"


class _GenerationBlocks(Extension):
    """`{% generation %}` marks the assistant's words for supervised training; here only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
