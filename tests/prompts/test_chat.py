"""Chat templates are rendered as transformers renders them, without transformers."""

import importlib.util
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from darts_async.errors import ConfigError, DataError, ModelError
from darts_async.prompts.chat import ChatMessage, ChatTemplate
from darts_async.prompts.chat_files import load_chat_template
from tests.support.byte_tokenizer import write_tokenizer

CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

EVERY_FEATURE = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'tool' %}
        {{ raise_exception('no tools here') }}
    {% endif %}
    {% if message.role == 'assistant' %}
{% generation %}
{{ message.content }}{{ eos_token }}
{% endgeneration %}
    {% else %}
  {{ message | tojson(indent=2) }} {{ '<é&>' | tojson }}
    {% endif %}
{% endfor %}
{{ strftime_now('%%') }} {{ pad_token }} {{ undefined_thing }}
"""

CONVERSATION = [
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", content="What is <2 & 3>?  "),
    ChatMessage(role="assistant", content="Nothing."),
    ChatMessage(role="user", content="Grüße\n\n  twice"),
]


def render(model_dir: Path, messages: list[ChatMessage]) -> str:
    template = load_chat_template(model_dir)
    assert template is not None
    return template.render(messages)


@pytest.mark.slow
@pytest.mark.parametrize("source", [CHATML, EVERY_FEATURE], ids=["chatml", "every feature"])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2]], ids=["turns", "one"])
def test_rendering_equals_transformers(tmp_path: Path, source: str, messages: list[ChatMessage]) -> None:
    from transformers import AutoTokenizer

    model_dir = write_tokenizer(tmp_path, chat_template=source)
    reference = AutoTokenizer.from_pretrained(model_dir)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert render(model_dir, messages) == expected


def test_the_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="from the configuration")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert render(tmp_path, CONVERSATION) == "from the file"


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert render(write_tokenizer(tmp_path, chat_template=named), CONVERSATION) == "plain"


def test_several_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=[{"name": "tool_use", "template": "tools"}])
    with pytest.raises(ModelError, match=r"has the chat templates \['tool_use'\]"):
        load_chat_template(tmp_path)


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(write_tokenizer(tmp_path)) is None
    assert load_chat_template(tmp_path / "nowhere") is None


def test_a_broken_template_names_its_file_and_line(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="fine\n{% if %}")
    with pytest.raises(ModelError, match=r"tokenizer_config.json is not valid: .* \(line 2\)"):
        load_chat_template(tmp_path)


def test_a_configuration_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds a list"):
        load_chat_template(tmp_path)


def test_what_a_template_raises_is_an_error_of_the_data(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="refuses the conversation: roles must alternate"):
        render(tmp_path, CONVERSATION)


def test_a_template_cannot_leave_the_sandbox(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{{ messages.append(1) }}{{ ''.__class__.__mro__ }}")
    with pytest.raises(DataError, match="unsafe"):
        render(tmp_path, CONVERSATION)


def test_special_tokens_may_be_stored_as_objects(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{{ bos_token }}{{ eos_token }}{{ unk_token }}")
    assert render(tmp_path, CONVERSATION) == "<|endoftext|><|im_end|>"
    assert isinstance(json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"], dict)


# --- public templates ----------------------------------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number", "description": "é & <b>"}}},
        },
    }
]
CONVERSATIONS: dict[str, list[ChatMessage]] = {
    "one": [{"role": "user", "content": "What is <2 & 3>?  "}],
    "turns": CONVERSATION,
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Grüße"}, {"type": "text", "text": " twice"}]}],
    "thinking": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\none and one\n</think>\n\n2", "reasoning_content": "one and one"},
        {"role": "user", "content": "and one more?"},
    ],
    "tool calls": [
        {"role": "user", "content": "1 + 1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "a1b2c3d4e"},
    ],
}


def public_templates() -> list[Path]:
    """Templates of public models, in their full form and in those that are trained on: they come with TRL and vLLM."""
    places = [importlib.util.find_spec(package) for package in ("trl", "vllm")]
    folders = [Path(place.origin).parent for place in places if place is not None and place.origin is not None]
    return sorted(path for folder in folders for path in folder.rglob("*.jinja") if "template" in str(path.parent))


def test_there_are_more_than_forty_public_templates() -> None:
    assert len(public_templates()) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("file", public_templates(), ids=lambda path: path.stem)
def test_a_public_template_is_rendered_as_transformers_renders_it(file: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(file.read_text())
    reference = reference_tokenizer()
    num_rendered = 0
    for arguments in arguments_of(tmp_path):
        template = load_chat_template(tmp_path, arguments=arguments)
        assert template is not None
        settings = {"chat_template": file.read_text(), "add_generation_prompt": True, "tokenize": False, **arguments}
        for messages in CONVERSATIONS.values():
            expected = outcome(lambda m=messages, s=settings: reference.apply_chat_template(m, **s))
            assert outcome(lambda t=template, m=messages: t.render(m)) == expected, (messages, arguments)
            num_rendered += expected is not None
    assert num_rendered, "no conversation suits this template"


@cache
def reference_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as directory:
        return PreTrainedTokenizerFast.from_pretrained(write_tokenizer(Path(directory)))


def arguments_of(model_dir: Path) -> list[dict[str, Any]]:
    """Those that people set, where the template reads them."""
    template = load_chat_template(model_dir)
    assert template is not None
    settings: list[dict[str, Any]] = [{"enable_thinking": False}, {"enable_thinking": True}, {"tools": TOOLS}]
    return [{}, *(each for each in settings if template.names.issuperset(each))]


def outcome(render: Any) -> str | None:
    """The text, or None where the template refuses the conversation."""
    try:
        return str(render())
    except Exception:  # noqa: BLE001 - whatever a template does wrong
        return None


# --- sets of templates, arguments, special tokens ------------------------------------------------------------


def named(name: str, **others: str) -> dict[str, str]:
    return {"default": "plain", name: f"{name}: {{{{ messages[0].content }}}}", **others}


@pytest.mark.parametrize("form", ["list", "object", "files"])
def test_a_template_of_a_set_is_chosen_by_name_or_by_tools(tmp_path: Path, form: str) -> None:
    templates = named("tool_use") | {"rag": "rag {{ documents }} {{ tools }}"}
    if form == "files":
        write_tokenizer(tmp_path, chat_template="not this one")
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "chat_template.jinja").write_text(templates.pop("default"))
        for name, text in templates.items():
            (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    else:
        stored = [{"name": n, "template": t} for n, t in templates.items()] if form == "list" else templates
        write_tokenizer(tmp_path, chat_template=stored)
    messages = [{"role": "user", "content": "x"}]

    def rendered(**choice: Any) -> str:
        template = load_chat_template(tmp_path, **choice)
        assert template is not None
        return template.render(messages)

    assert rendered() == "plain"
    assert rendered(name="tool_use") == "tool_use: x"
    assert rendered(name="rag") == "rag None None"
    with pytest.raises(
        ConfigError, match=r"prompts.chat_template is 'tools', but the templates .* are \['default', 'rag'"
    ):
        rendered(name="tools")


def test_tools_as_an_argument_choose_the_template_for_them(tmp_path: Path) -> None:
    stored = {"default": "plain", "tool_use": "{{ tools | length }} tools"}
    template = load_chat_template(write_tokenizer(tmp_path, chat_template=stored), arguments={"tools": TOOLS})
    assert template is not None
    assert template.render(CONVERSATION) == "1 tools"


def test_an_argument_that_the_template_never_reads_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}")
    template = load_chat_template(tmp_path, arguments={"enable_thinking": True})
    assert template is not None
    assert template.render(CONVERSATION) == "<think>"
    with pytest.raises(ConfigError, match=r"has 'enable_thnking', .* did you mean 'enable_thinking'\?"):
        load_chat_template(tmp_path, arguments={"enable_thnking": True})


@pytest.mark.slow
@pytest.mark.parametrize("old_form", [False, True], ids=["config", "special_tokens_map"])
def test_special_tokens_come_from_every_file_that_transformers_reads(tmp_path: Path, old_form: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    names = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token", "boi_token", "named_token")
    write_tokenizer(tmp_path, chat_template="|".join(f"{{{{ {name} }}}}" for name in names))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"image_token": "<img>", "extra_special_tokens": {"boi_token": "<boi>"}}
    if not old_form:
        config["added_tokens_decoder"] = {"7": {"content": "<img>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    stored = {"bos_token": "<old>", "unk_token": {"content": "<unk>"}, "named_token": "<named>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(stored))
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    assert render(tmp_path, CONVERSATION) == expected
    assert ("<old>" in expected) == old_form


def test_a_token_that_only_a_tokenizer_class_knows_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{{ unk_token }}x")
    assert render(tmp_path, CONVERSATION) == "x"
    file = tmp_path / "tokenizer_config.json"
    file.write_text(file.read_text().replace("PreTrainedTokenizerFast", "LlamaTokenizer"))
    with pytest.raises(
        ModelError, match=r"reads unk_token, which is in no file; .*: write 'unk_token' into tokenizer_conf"
    ):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    "source",
    ["{{ 1 // 0 }}", "{{ messages[0].x.y }}", "{{ messages | first(2) }}", "{{ 'a' + 1 }}"],
    ids=["division", "undefined", "filter", "types"],
)
def test_whatever_goes_wrong_in_a_template_is_an_error_of_the_data(tmp_path: Path, source: str) -> None:
    write_tokenizer(tmp_path, chat_template=source)
    with pytest.raises(DataError, match="refuses the conversation"):
        render(tmp_path, CONVERSATION)


def test_a_template_without_an_end_is_refused() -> None:
    endless = ChatTemplate("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}, "here")
    with pytest.raises(DataError, match="the chat template refuses the conversation: maximum recursion depth"):
        endless.render(CONVERSATION)
    with pytest.raises(ModelError, match="the chat template in here is not valid: it is nested too deeply"):
        ChatTemplate("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", {}, "here")
