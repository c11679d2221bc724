"""How models mark what is not said to the user: thoughts, and calls of tools. Told from the chat template they ship.

    thoughts   <think> ... </think>, as DeepSeek-R1, Qwen3 and most since write them
    hermes     <tool_call> {"name": .., "arguments": {..}} </tool_call>, once a call (Hermes, Qwen2.5, Qwen3)
    mistral    [TOOL_CALLS] [{"name": .., "arguments": {..}}, ..], or newer: [TOOL_CALLS]name[ARGS]{..}, to the end
    llama      {"name": .., "parameters": {..}} as the whole answer, <|python_tag|> before it or not (Llama 3.1 on)

Where a mark is a special token of the vocabulary it is shown all the same, else it could not be found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

THINK, THOUGHT = "<think>", "</think>"
ARGS = "[ARGS]"

Thinking = Literal["never", "perhaps", "at once"]  # at once: the prompt ends inside a thought


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """`closing` None: calls go on to the end of the answer. `is_bare`: an answer that begins with { is a call."""

    name: str
    opening: str
    closing: str | None = None
    key: str = "arguments"
    is_bare: bool = False
    is_list: bool = False


FORMS: dict[str, CallForm] = {
    "hermes": CallForm(name="hermes", opening="<tool_call>", closing="</tool_call>"),
    "mistral": CallForm(name="mistral", opening="[TOOL_CALLS]", is_list=True),
    "llama": CallForm(name="llama", opening="<|python_tag|>", key="parameters", is_bare=True),
}
MARKS = frozenset(
    [THINK, THOUGHT, ARGS]
    + [mark for form in FORMS.values() for mark in (form.opening, form.closing) if mark]
)


def form_of(template: str) -> CallForm | None:
    """The form that a chat template shows its model; None where it says nothing of tools, or in a way not known."""
    if "tools" not in template:
        return None
    for name, sign in (("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]")):
        if sign in template:
            return FORMS[name]
    return FORMS["llama"] if '"parameters"' in template else None


def thinks(template: str) -> bool:
    return THOUGHT in template


def thinking_of(prompt: str, does_think: bool) -> Thinking:
    """How the answer to a rendered prompt begins."""
    if not does_think:
        return "never"
    return "at once" if prompt.rstrip().endswith(THINK) else "perhaps"
