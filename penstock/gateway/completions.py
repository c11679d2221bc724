"""`/v1/completions`: text that goes on where the prompt ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.core.types import TokenLogprob
from penstock.gateway.answer import Entry
from penstock.gateway.ask import Ask
from penstock.gateway.shapes import (
    Choice,
    Piece,
    PromptLogprobs,
    Usage,
    closing,
    encode,
    finite,
    head,
    opening,
    reason,
)
from penstock.gateway.text import TextModel

KIND = "text_completion"


class CompletionShape:
    """Bodies of one call. With `echo` a choice begins with the prompt's text, and offsets count from there."""

    def __init__(self, ask: Ask, created: int) -> None:
        self._ask = ask
        self._created = created
        self._opening = opening(ask, KIND, created)
        self._closing = closing(ask)
        self._heads = [
            self._opening + b'{"index":' + str(choice).encode() + b',"text":'
            for choice in range(len(ask.prompts) * ask.n)
        ]
        self._tail = b',"logprobs":null,"finish_reason":null}' + self._closing
        self._echoes = [_echo(ask, prompt) for prompt in range(len(ask.prompts))]

    def open(self, choice: int, prompt_logprobs: PromptLogprobs) -> bytes:
        if not self._ask.echo:
            return b""
        echo = self._echoes[choice // self._ask.n]
        table: dict[str, Any] = {
            "index": choice,
            "text": echo,
            "logprobs": self._logprobs(choice, (), prompt_logprobs),
            "finish_reason": "length" if self._ask.echo_only else None,
        }
        return self._opening + encode(table) + self._closing

    def chunk(self, piece: Piece) -> bytes:
        if self._ask.echo_only:
            return b""
        if piece.finish is None and not piece.entries:
            return self._heads[piece.choice] + encode(piece.text) + self._tail
        table = {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": self._logprobs(piece.choice, piece.entries, None),
            "finish_reason": reason(piece.finish),
            "stop_reason": piece.stop_reason,
        }
        return self._opening + encode(table) + self._closing

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._opening + b'],"usage":' + encode(usage.table()) + b"}\n\n"

    def whole(
        self, choices: Sequence[Choice], prompt_logprobs: Sequence[PromptLogprobs], usage: Usage
    ) -> dict[str, Any]:
        body = head(self._ask, KIND, self._created)
        body["choices"] = [
            self._whole_choice(number, choice, prompt_logprobs[number // self._ask.n])
            for number, choice in enumerate(choices)
        ]
        body["usage"] = usage.table()
        return body

    def _whole_choice(
        self, number: int, choice: Choice, prompt_logprobs: PromptLogprobs
    ) -> dict[str, Any]:
        ask = self._ask
        echo = self._echoes[number // ask.n] if ask.echo else ""
        text, entries = ("", ()) if ask.echo_only else (choice.text, choice.entries)
        return {
            "index": number,
            "text": echo + text,
            "logprobs": self._logprobs(number, entries, prompt_logprobs if ask.echo else None),
            "finish_reason": "length" if ask.echo_only else reason(choice.finish),
            "stop_reason": None if ask.echo_only else choice.stop_reason,
        }

    def _logprobs(
        self, choice: int, entries: Sequence[Entry], prompt: PromptLogprobs | None
    ) -> dict[str, Any] | None:
        """Parallel lists, the prompt's tokens first where they are echoed."""
        ask = self._ask
        if ask.sampling.logprobs is None:
            return None
        lists = _Lists(ask.text, ask.sampling.logprobs)
        if prompt is not None:
            lists.add_prompt(ask.prompts[choice // ask.n].ids, prompt)
        base = len(self._echoes[choice // ask.n]) if ask.echo else 0
        for entry in entries:
            lists.add(entry.logprob, base + entry.start)
        return lists.table()


def _echo(ask: Ask, prompt: int) -> str:
    if not ask.echo:
        return ""
    given = ask.prompts[prompt]
    return given.text if given.text is not None else ask.text.decode(given.ids)


class _Lists:
    """The four lists of the completions API."""

    def __init__(self, text: TextModel, num_top: int) -> None:
        self._text = text
        self._num_top = num_top
        self.tokens: list[str] = []
        self.token_logprobs: list[float | None] = []
        self.top_logprobs: list[dict[str, float] | None] = []
        self.text_offset: list[int] = []

    def add(self, told: TokenLogprob, offset: int) -> None:
        token = self._name(told.id)
        self.tokens.append(token)
        self.token_logprobs.append(finite(told.logprob))
        self.text_offset.append(offset)
        top = {self._name(id): finite(value) for id, value in told.top[: self._num_top]}
        self.top_logprobs.append({**top, token: finite(told.logprob)} if top else None)

    def add_prompt(self, ids: Sequence[int], told: PromptLogprobs) -> None:
        reader = self._text.detokenizer()
        offset = 0
        for place, id in enumerate(ids):
            logprob = told[place] if place < len(told) else None
            if logprob is None:
                self.tokens.append(self._name(id))
                self.token_logprobs.append(None)
                self.top_logprobs.append(None)
                self.text_offset.append(offset)
            else:
                self.add(logprob, offset)
            offset += len(reader.push((id,)))

    def _name(self, id: int) -> str:
        """A token as text; one that is no whole character is spelt out, as OpenAI does."""
        piece = self._text.token_bytes(id)
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def table(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs if self._num_top else None,
            "text_offset": self.text_offset,
        }
