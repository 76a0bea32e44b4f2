"""Chat templates are rendered as transformers renders them, without transformers."""

import json
from pathlib import Path

import pytest

from darts_async.errors import DataError, ModelError
from darts_async.prompts.chat import ChatMessage, load_chat_template
from tests.byte_tokenizer import write_tokenizer

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
    with pytest.raises(ModelError, match=r"tokenizer_config.json has the chat templates \['tool_use'\]"):
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
