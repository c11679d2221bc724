"""An answer's text taken apart as it comes: thoughts, what is said, and calls of tools (gateway.marks).

Law: however the text was cut into pieces, the parts joined are the same; a call's arguments are told as they come,
exactly as the model wrote them; what looked like a call and is none is said as text, nothing is lost. White space
between the parts belongs to none of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from penstock.gateway.marks import ARGS, THINK, THOUGHT, CallForm, Thinking

BETWEEN = " \t\r\n[],;"  # calls
NAMED = re.compile(r"[\w.-]+")


class Part(NamedTuple):
    """`call`: number of the call that a name or arguments belong to."""

    kind: Literal["thought", "said", "call", "arguments"]
    text: str
    call: int = 0


@dataclass(slots=True)
class JsonEnd:
    """Finds where a JSON object ends, character by character."""

    depth: int = 0
    is_quoted: bool = False
    is_escaped: bool = False

    def find(self, text: str) -> int | None:
        """Length of `text` up to the end of the object; None when it goes on. Each text is looked at once."""
        for place, char in enumerate(text):
            if self.is_quoted:
                if self.is_escaped:
                    self.is_escaped = False
                elif char == "\\":
                    self.is_escaped = True
                elif char == '"':
                    self.is_quoted = False
            elif char == '"':
                self.is_quoted = True
            elif char in "{[":
                self.depth += 1
            elif char in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    return place + 1
        return None


class Splitter:
    """One answer. `form` None: no tools were offered. `most_calls` None: as many as it makes."""

    def __init__(
        self, form: CallForm | None, thinking: Thinking, most_calls: int | None = None
    ) -> None:
        self._form, self._most_calls = form, most_calls
        begin = {"never": self._said, "perhaps": self._begun, "at once": self._thought}
        self._state = begin[thinking]
        self._text = ""  # not taken apart yet
        self._blank = ""  # white space held back: it may be between two parts
        self._has_spoken = False  # within this part
        self._is_behind = False  # another part
        self._raw = ""  # of a call that is not understood yet
        self._end = JsonEnd()
        self._out: list[Part] = []
        self.num_calls = 0
        header = rf'\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{form.key if form else ""}"\s*:\s*(?=\{{)'
        self._header = re.compile(header)

    def push(self, text: str) -> list[Part]:
        """Parts that are certain by now."""
        self._text += text
        state = None
        while state != self._state:  # each takes what it can, and names the next where it is done
            state = self._state
            state(is_last=False)
        return self._taken()

    def end(self) -> list[Part]:
        """The rest, when no more text comes."""
        state = None
        while state != self._state:
            state = self._state
            state(is_last=True)
        return self._taken()

    def _taken(self) -> list[Part]:
        out, self._out = self._out, []
        return out

    def _begun(self, *, is_last: bool) -> None:
        """Nothing is known yet: a thought may begin here."""
        text = self._text.lstrip()
        if text.startswith(THINK):
            self._text, self._state = text[len(THINK) :], self._thought
        elif is_last or not THINK.startswith(text):
            self._state = self._said

    def _thought(self, *, is_last: bool) -> None:
        before, is_found = self._until(THOUGHT, is_last)
        self._tell("thought", before, keeps_end=is_last)
        if is_found:
            self._silence()
            self._state = self._said

    def _said(self, *, is_last: bool) -> None:
        form = self._form
        if form is None:
            text, self._text = self._text, ""
            self._tell("said", text, keeps_end=True)
            return
        if form.is_bare and not self._has_spoken and self._text.lstrip().startswith("{"):
            self._call_begins("")
            return
        before, is_found = self._until(form.opening, is_last)
        self._tell("said", before, keeps_end=is_last)
        if is_found:
            self._call_begins(form.opening)

    def _call_begins(self, mark: str) -> None:
        self._raw = self._blank + mark
        self._silence()
        self._state = self._between

    def _between(self, *, is_last: bool) -> None:
        """Before a call, or behind the last."""
        form = self._form
        assert form is not None
        text = self._text.lstrip(BETWEEN)
        self._raw += self._text[: len(self._text) - len(text)]
        self._text = text
        is_empty = self._raw.strip(BETWEEN) != ""  # opened, and nobody was called
        if form.closing is not None:
            if text.startswith(form.closing) and is_empty:
                self._none(form.closing, text[len(form.closing) :])
                return
            if text.startswith(form.closing):
                self._text, self._raw, self._state = text[len(form.closing) :], "", self._said
                return
            if form.closing.startswith(text) and not is_last:
                return
            if form.closing.startswith(text) and not is_empty:  # cut off there
                self._text = ""
                return
        if text:
            self._state = self._headed
        elif is_last and is_empty:
            self._none("", "")

    def _headed(self, *, is_last: bool) -> None:
        """A call has begun: who is called?"""
        text = self._text
        found = self._header.match(text)
        if found is not None:
            self._text = text[found.end() :]
            self._name(json.loads(found[1], strict=False))
            self._state, self._end = self._arguments, JsonEnd()
            return
        named, mark, rest = text.partition(ARGS)
        is_list = self._form is not None and self._form.is_list
        if is_list and mark and NAMED.fullmatch(named.strip()):
            self._text = rest
            self._name(named.strip())
            self._state, self._end = self._arguments, JsonEnd()
            return
        end = JsonEnd().find(text) if text.startswith("{") else None
        if end is not None:
            self._whole(text[:end], text[end:])
        elif is_last or not (text.startswith("{") or (is_list and NAMED.match(text))):
            self._none(text, "")

    def _whole(self, text: str, rest: str) -> None:
        """A call whose parts come in another order."""
        try:
            told = json.loads(text, strict=False)
        except json.JSONDecodeError:
            told = {}
        name = told.get("name")
        given = told.get("arguments", told.get("parameters"))
        if not isinstance(name, str) or not isinstance(given, (dict, str)):
            self._none(text, rest)
            return
        self._name(name)
        self._argue(given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
        self._text, self._state = rest, self._between

    def _none(self, text: str, rest: str) -> None:
        """What looked like a call is text."""
        self._text, self._raw, raw = rest, "", self._raw
        self._has_spoken = True
        self._tell("said", raw + text, keeps_end=True)
        self._state = self._said

    def _arguments(self, *, is_last: bool) -> None:
        end = self._end.find(self._text)
        text = self._text if end is None else self._text[:end]
        self._text = self._text[len(text) :]
        self._argue(text)
        if end is not None:
            self._state = self._closed

    def _closed(self, *, is_last: bool) -> None:
        """Behind the arguments the call's own brace is left, unless its name came before it."""
        text = self._text.lstrip()
        if text:
            self._text = text[1:] if text.startswith("}") else text
            self._raw, self._state = "", self._between

    def _name(self, name: str) -> None:
        self.num_calls += 1
        self._raw = ""
        if not self._is_spare:
            self._out.append(Part("call", name, self.num_calls - 1))

    def _argue(self, text: str) -> None:
        if text and not self._is_spare:
            self._out.append(Part("arguments", text, self.num_calls - 1))

    @property
    def _is_spare(self) -> bool:
        return self._most_calls is not None and self.num_calls > self._most_calls

    def _until(self, mark: str, is_last: bool) -> tuple[str, bool]:
        """Text before the mark, taken, and whether the mark was there; what may be its beginning stays."""
        before, found, after = self._text.partition(mark)
        if found:
            self._text = after
            return before, True
        size = len(before)
        if not is_last:
            longest = min(len(mark) - 1, size)
            held = [count for count in range(longest, 0, -1) if mark.startswith(before[-count:])]
            size -= held[0] if held else 0
        self._text = before[size:]
        return before[:size], False

    def _tell(self, kind: Literal["thought", "said"], text: str, *, keeps_end: bool) -> None:
        text = self._blank + text
        if not self._has_spoken and (kind == "thought" or self._is_behind):
            text = text.lstrip()
        told = text if keeps_end else text.rstrip()
        self._blank = text[len(told) :]
        if told:
            self._has_spoken = True
            self._out.append(Part(kind, told))

    def _silence(self) -> None:
        """A part is over: white space behind it is dropped, and what comes before the next."""
        self._blank, self._has_spoken, self._is_behind = "", False, True
