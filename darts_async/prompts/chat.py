"""Chat templates: messages in, the text that the model was trained to continue out.

A template is a program that comes with the model, so it is rendered in jinja's sandbox. The environment is the one
that transformers documents for template authors (block trimming, loop controls, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`, `generation` blocks); a test holds the two renderings equal. Whatever special
tokens there are, the template writes them: its output is tokenised without adding any.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from darts_async.errors import DataError, ModelError

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
TOKEN_VARIABLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatMessage(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class ChatTemplate:
    """A compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], place: str) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template in {place} is not valid: {error} (line {error.lineno})") from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The conversation as text, up to where the assistant's turn begins.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._special_tokens)
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error


def load_chat_template(model_dir: Path) -> ChatTemplate | None:
    """The template of a model directory: `chat_template.jinja`, else what `tokenizer_config.json` holds.

    Raises:
        ModelError: the configuration cannot be read, has several templates and no default, or a broken one.
    """
    config = _read_config(model_dir / CONFIG_FILE)
    special_tokens = {name: text for name in TOKEN_VARIABLES if (text := _token_text(config.get(name))) is not None}
    template_file = model_dir / TEMPLATE_FILE
    if template_file.is_file():
        return ChatTemplate(template_file.read_text("utf-8"), special_tokens, str(template_file))
    place = str(model_dir / CONFIG_FILE)
    source = _default_template(config.get("chat_template"), place)
    return None if source is None else ChatTemplate(source, special_tokens, place)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds a {type(config).__name__}; a tokenizer's configuration is an object")
    return config


def _token_text(token: Any) -> str | None:
    """A special token is stored as text, or as an object with its text in `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _default_template(stored: Any, place: str) -> str | None:
    if stored is None or isinstance(stored, str):
        return stored
    named = {entry["name"]: entry["template"] for entry in stored}
    if "default" not in named:
        raise ModelError(f"{place} has the chat templates {sorted(named)}, and none of them is named 'default'")
    return str(named["default"])


class _GenerationBlocks(Extension):
    """`{% generation %}` marks the assistant's words for supervised training; here it only renders its body."""

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
