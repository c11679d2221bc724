"""Chat templates render as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from penstock.core.errors import BadModel, BadRequest
from penstock.gateway.text import TextModel

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""  # noqa: E501
CHATML = """{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISC = """{{ bos_token }}
{% for message in messages %}
  {% if loop.first %}
    {{ message | tojson }} {{ message | tojson(indent=2) }}
  {% endif %}
  {{ loop.index }}: {{ message['content'] | trim }} <a href="&amp;">
{% endfor %}
{% set ns = namespace(found=false) %}{% if not ns.found %}{{ strftime_now('%Y') | length }}{% endif %}
{% if tools is not none or documents %}never{% endif %}{% if unknown is defined %}never{% endif %}
"""
GEMMA = """{{ bos_token }}{% set first = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = (messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text']) + '\n\n' %}
    {%- set loop_messages = messages[1:] %}
{%- else %}{% set loop_messages = messages %}{% endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 is even) %}{{ raise_exception('Roles take turns') }}{% endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}
    {%- if message['content'] is string %}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable %}{% for item in message['content'] %}{{ item['text'] | trim }}{% endfor %}
    {%- else %}{{ raise_exception('Neither text nor parts') }}{% endif %}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""  # noqa: E501
PHI3 = """{% for message in messages %}{% if message['role'] in ('system', 'user') and message['content'] %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""  # noqa: E501
DEEPSEEK = """{% if add_generation_prompt is not defined %}{% set add_generation_prompt = false %}{% endif %}
{{- bos_token }}
{%- set names = {'user': 'User: ', 'assistant': 'Assistant: ', 'system': ''} %}
{%- for message in messages %}
    {{- names[message['role']] ~ message['content'] ~ (eos_token if message['role'] == 'assistant' else '\n\n') }}
{%- endfor %}
{%- if add_generation_prompt %}{{ names.assistant | trim }}{% endif %}"""
TEMPLATES = {
    "llama2": LLAMA2,
    "chatml": CHATML,
    "misc": MISC,
    "gemma": GEMMA,
    "phi3": PHI3,
    "deepseek": DEEPSEEK,
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " Hi <there> & żółw 🐢 "}],
    [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "\n sure?"},
    ],
]


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("chat", CHATS, ids=["short", "long"])
@pytest.mark.parametrize("extras", [{}, {"enable_thinking": False}], ids=["plain", "extras"])
@pytest.mark.parametrize("prompted", [True, False])
def test_equals_transformers(
    folder: Path,
    tmp_path: Path,
    source: str,
    chat: list[dict[str, Any]],
    extras: dict[str, Any],
    prompted: bool,
) -> None:
    copy(folder, tmp_path, chat_template=source, bos_token="<s>", eos_token={"content": "</s>"})
    ours = TextModel.load(tmp_path).render(chat, add_generation_prompt=prompted, extras=extras)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    assert ours == theirs.apply_chat_template(
        chat, chat_template=source, tokenize=False, add_generation_prompt=prompted, **extras
    )


def copy(folder: Path, to: Path, **config: object) -> None:
    for name in ("tokenizer.json", "config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    (to / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_file_of_its_own_wins(folder: Path, tmp_path: Path) -> None:
    copy(folder, tmp_path, chat_template="wrong")
    (tmp_path / "chat_template.jinja").write_text("right {{ messages | length }}")
    assert TextModel.load(tmp_path).render(CHATS[0]) == "right 1"


def test_what_files_about_several_models_leave_out(folder: Path, tmp_path: Path) -> None:
    """Gemma 3 with a vision tower says nothing of its context where it is the usual one."""
    copy(folder, tmp_path)
    text = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2}
    told = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert TextModel.load(tmp_path).context_tokens == 131072


def test_named_templates(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    copy(folder, tmp_path, chat_template=named)
    assert TextModel.load(tmp_path).render(CHATS[0]) == "d"


def test_a_template_that_refuses_is_the_callers_error(folder: Path, tmp_path: Path) -> None:
    copy(folder, tmp_path, chat_template=LLAMA2, bos_token="<s>", eos_token="</s>")
    with pytest.raises(BadRequest, match="must alternate"):
        TextModel.load(tmp_path).render([{"role": "assistant", "content": "x"}])


def test_a_template_cannot_reach_python(folder: Path, tmp_path: Path) -> None:
    copy(folder, tmp_path, chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(BadRequest):
        TextModel.load(tmp_path).render(CHATS[0])


def test_a_model_without_a_template_says_so(folder: Path, tmp_path: Path) -> None:
    copy(folder, tmp_path)
    with pytest.raises(BadRequest, match="no chat template"):
        TextModel.load(tmp_path).render(CHATS[0])


def test_broken_folders_name_the_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="config.json is missing"):
        TextModel.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadModel, match="tokenizer.json is missing"):
        TextModel.load(tmp_path)
    copy(folder, tmp_path, chat_template="{% if %}")
    with pytest.raises(BadModel, match="tokenizer_config.json does not parse"):
        TextModel.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadModel, match="tokenizer_config.json cannot be read"):
        TextModel.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadModel, match="tokenizer.json is not a tokenizer"):
        TextModel.load(tmp_path)


def test_end_tokens_and_context(folder: Path, tmp_path: Path) -> None:
    copy(folder, tmp_path, eos_token="<|end|>")
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 8], "temperature": 0.6, "top_k": 20})
    )
    text = TextModel.load(tmp_path, max_context=100)
    assert text.eos_ids == {0, 7, 8}
    assert text.context_tokens == 100
    assert (text.preferred.temperature, text.preferred.top_k) == (0.6, 20)
    assert text.preferred.top_p is None
