"""Reads the chat templates of a model directory and the special tokens that they may name, as transformers does.

Templates: `chat_template.jinja` is the default one and `additional_chat_templates/NAME.jinja` are named ones. Without
such files, the entry `chat_template` of `tokenizer_config.json` counts: a text, or a set of named texts. Special
tokens: every entry `..._token` of `tokenizer_config.json` and every entry of its object `extra_special_tokens`. In
directories of an older form, without `added_tokens_decoder`, `special_tokens_map.json` takes precedence.

Some tokenizer classes of transformers have special tokens that are in no file. A template that reads such a token is
refused, because it would be rendered without it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darts_async.errors import ConfigError, ModelError
from darts_async.prompts.chat import ChatTemplate

TEMPLATE_FILE = "chat_template.jinja"
NAMED_TEMPLATES_DIR = "additional_chat_templates"
CONFIG_FILE = "tokenizer_config.json"
OLD_TOKENS_FILE = "special_tokens_map.json"
STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT = "default"
_TOOLS = "tool_use"
_CLASSES_WITHOUT_TOKENS = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")


def load_chat_template(
    model_dir: Path, name: str | None = None, arguments: Mapping[str, Any] | None = None
) -> ChatTemplate | None:
    """The template of a model directory, None if it has none.

    Args:
        name: name of one of several templates. Default: `tool_use`, if it exists and the arguments have tools,
            otherwise `default`.
        arguments: variables for the template, such as `enable_thinking`.

    Raises:
        ModelError: the files cannot be read, the template is broken, or there are several and none is chosen.
        ConfigError: there is no template of that name, or the template reads no argument of that name.
    """
    config = _read_object(model_dir / CONFIG_FILE)
    found = _template_files(model_dir) or _stored_templates(config.get("chat_template"), model_dir / CONFIG_FILE)
    if not found:
        if name is not None:
            raise ConfigError(f"prompts.chat_template is {name!r}, but {model_dir} has no chat template")
        return None
    source, place = _chosen(found, name, has_tools=bool((arguments or {}).get("tools")), model_dir=model_dir)
    tokens = special_tokens(model_dir, config)
    template = ChatTemplate(source, tokens, place, arguments)
    _check_tokens_are_known(template, tokens, config, place)
    return template


def special_tokens(model_dir: Path, config: dict[str, Any]) -> dict[str, str]:
    """All special tokens of the files, {name: text}. Raises `ModelError` if one cannot be read."""
    stored = dict(config)
    if "added_tokens_decoder" not in config:
        stored |= _read_object(model_dir / OLD_TOKENS_FILE)
    found = {name: token for name, token in stored.items() if name.endswith("_token")}
    if isinstance(named := stored.get("extra_special_tokens"), dict):
        found |= named
    return {name: text for name, token in found.items() if (text := _token_text(token)) is not None}


def _template_files(model_dir: Path) -> dict[str, tuple[str, str]]:
    """{name: (template, where it comes from)}"""
    files = {path.stem: path for path in sorted((model_dir / NAMED_TEMPLATES_DIR).glob("*.jinja"))}
    if (model_dir / TEMPLATE_FILE).is_file():
        files.setdefault(_DEFAULT, model_dir / TEMPLATE_FILE)
    return {name: (_read_text(path), str(path)) for name, path in files.items()}


def _stored_templates(stored: Any, file: Path) -> dict[str, tuple[str, str]]:
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {_DEFAULT: (stored, str(file))}
    try:
        named = stored if isinstance(stored, dict) else {entry["name"]: entry["template"] for entry in stored}
        return {str(name): (_as_text(template), f"{file} ({name!r})") for name, template in named.items()}
    except (TypeError, KeyError) as error:
        raise ModelError(f"{file}: chat_template is neither a text nor a set of named texts") from error


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _chosen(
    found: dict[str, tuple[str, str]], name: str | None, *, has_tools: bool, model_dir: Path
) -> tuple[str, str]:
    if name is not None:
        if name not in found:
            raise ConfigError(
                f"prompts.chat_template is {name!r}, but the templates of {model_dir} are {sorted(found)}"
            )
        return found[name]
    if has_tools and _TOOLS in found:
        return found[_TOOLS]
    if _DEFAULT not in found:
        raise ModelError(
            f"{model_dir} has the chat templates {sorted(found)}, and none of them is named 'default'; "
            "name one in prompts.chat_template"
        )
    return found[_DEFAULT]


def _check_tokens_are_known(template: ChatTemplate, tokens: dict[str, str], config: dict[str, Any], place: str) -> None:
    missing = [name for name in STANDARD_TOKENS if name in template.names and name not in tokens and name not in config]
    if missing and config.get("tokenizer_class") not in _CLASSES_WITHOUT_TOKENS:
        raise ModelError(
            f"the chat template in {place} reads {missing[0]}, which is in no file; the tokenizer's class may define "
            f"it: write {missing[0]!r} into {CONFIG_FILE} (null, if there is none)"
        )


def _token_text(token: Any) -> str | None:
    """A special token is stored as text, or as an object with its text in `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds a {type(config).__name__}; an object was expected")
    return config


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
