"""Answers taken apart: the same parts however the text was cut, and nothing lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway.marks import FORMS, CallForm, Thinking
from penstock.gateway.parts import Part, Splitter

HERMES, MISTRAL, LLAMA = FORMS["hermes"], FORMS["mistral"], FORMS["llama"]
ARGUMENTS = '{"city": "Łódź } ] </tool_call> \\" {", "days": [1, {"a": "b"}]}'
CALL = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'


def read(text: str, form: CallForm | None, thinking: Thinking, *cuts: int) -> list[Part]:
    """Parts, those of one kind that follow each other joined."""
    splitter = Splitter(form, thinking)
    places = sorted({0, *(cut % (len(text) + 1) for cut in cuts), len(text)})
    parts: list[Part] = []
    for start, end in zip(places, places[1:], strict=False):
        parts += splitter.push(text[start:end])
    parts += splitter.end()
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if (
            last is not None
            and part.kind != "call"
            and last._replace(text="") == part._replace(text="")
        ):
            joined[-1] = last._replace(text=last.text + part.text)
        else:
            joined.append(part)
    return joined


CASES: list[tuple[str, CallForm | None, Thinking, list[Part]]] = [
    ("Hello < you {", HERMES, "never", [Part("said", "Hello < you {")]),
    (" Hello\n", HERMES, "never", [Part("said", " Hello\n")]),
    (
        f"Let me look.\n<tool_call>\n{CALL}\n</tool_call>",
        HERMES,
        "never",
        [Part("said", "Let me look."), Part("call", "get_weather"), Part("arguments", ARGUMENTS)],
    ),
    (
        f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{{"name":"b","arguments":{{}}}}</tool_call>\nDone.',
        HERMES,
        "never",
        [
            Part("call", "get_weather"),
            Part("arguments", ARGUMENTS),
            Part("call", "b", 1),
            Part("arguments", "{}", 1),
            Part("said", "Done."),
        ],
    ),
    (
        '<tool_call>{"arguments": {"x": 1}, "name": "late"}</tool_call>',
        HERMES,
        "never",
        [Part("call", "late"), Part("arguments", '{"x": 1}')],
    ),
    (
        "<tool_call> not a call </tool_call>",
        HERMES,
        "never",
        [Part("said", "<tool_call> not a call </tool_call>")],
    ),
    (
        "<think>\nA {call}? <tool_call>\n</think>\n\nNo.",
        HERMES,
        "perhaps",
        [Part("thought", "A {call}? <tool_call>"), Part("said", "No.")],
    ),
    ("so be it</think>Yes", None, "at once", [Part("thought", "so be it"), Part("said", "Yes")]),
    ("<thin ice", None, "perhaps", [Part("said", "<thin ice")]),
    ("never ends", None, "at once", [Part("thought", "never ends")]),
    (
        f'[TOOL_CALLS] [{CALL}, {{"name": "b", "arguments": {{"y": []}}}}]',
        MISTRAL,
        "never",
        [
            Part("call", "get_weather"),
            Part("arguments", ARGUMENTS),
            Part("call", "b", 1),
            Part("arguments", '{"y": []}', 1),
        ],
    ),
    (
        f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}",
        MISTRAL,
        "never",
        [Part("call", "get_weather"), Part("arguments", ARGUMENTS)],
    ),
    (
        CALL.replace("arguments", "parameters"),
        LLAMA,
        "never",
        [Part("call", "get_weather"), Part("arguments", ARGUMENTS)],
    ),
    (
        "<|python_tag|>" + CALL.replace("arguments", "parameters"),
        LLAMA,
        "never",
        [Part("call", "get_weather"), Part("arguments", ARGUMENTS)],
    ),
    ('{"answer": 42}', LLAMA, "never", [Part("said", '{"answer": 42}')]),
    ("A set {1}", LLAMA, "never", [Part("said", "A set {1}")]),
    (
        '<tool_call>{"name": "cut", "arguments": {"x": "ab',
        HERMES,
        "never",
        [Part("call", "cut"), Part("arguments", '{"x": "ab')],
    ),
]


@pytest.mark.parametrize(("text", "form", "thinking", "parts"), CASES)
def test_parts_are_told_apart(
    text: str, form: CallForm | None, thinking: Thinking, parts: list[Part]
) -> None:
    assert read(text, form, thinking) == parts
    assert read(text, form, thinking, *range(len(text))) == parts


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(CASES),
    st.lists(st.integers(0, 500), max_size=8),
)
def test_cuts_do_not_matter(
    case: tuple[str, CallForm | None, Thinking, list[Part]], cuts: list[int]
) -> None:
    text, form, thinking, parts = case
    assert read(text, form, thinking, *cuts) == parts


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "{", "}", '"name"', ": ", '"f"', ", ", "[", "x", "\\"]
        ),
        max_size=14,
    ).map("".join),
    st.lists(st.integers(0, 100), max_size=5),
)
def test_nothing_is_lost_of_what_is_no_call(text: str, cuts: list[int]) -> None:
    parts = read(text, HERMES, "never", *cuts)
    assert parts == read(text, HERMES, "never")
    if all(part.kind == "said" for part in parts):
        assert "".join(part.text for part in parts) == text


def test_more_calls_than_wanted_are_dropped() -> None:
    splitter = Splitter(HERMES, "never", 1)
    text = f"<tool_call>{CALL}</tool_call>" * 2
    parts = [*splitter.push(text), *splitter.end()]
    assert [part.kind for part in parts] == ["call", "arguments"]
    assert json.loads(parts[1].text)["days"][0] == 1
