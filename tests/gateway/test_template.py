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
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " Hi <there> & żółw 🐢 "}],
    [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "\n sure?"},
    ],
]


@pytest.mark.parametrize("source", [LLAMA2, CHATML, MISC], ids=["llama2", "chatml", "misc"])
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
