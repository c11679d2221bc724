"""Token ids -> text, as they come.

Law: the pieces, joined, are what decoding all the ids at once gives, and no piece ever ends inside a character.

Two ways. Byte-level vocabularies (GPT-2, Llama 3, Qwen, ours) give every token fixed bytes, so text is a running
UTF-8 decoder over a table: constant work a token. Any other decoder (sentencepiece spaces, byte fallback,
WordPiece) may look at its neighbours, so a small window of tokens is decoded twice and the difference is the news;
it is held back while it ends in U+FFFD, the sign of a character that is not complete. A window never holds more
than MAX_HELD tokens: a model that writes broken characters for ever is still heard. (Byte fallback judges a whole
run of byte tokens at once, so after an invalid run the text already told may differ from the whole's.)
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

MAX_HELD = 16
REPLACEMENT = "�"

Decode = Callable[[Sequence[int]], str]


class Detokenizer(Protocol):
    """One answer's text so far."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that became certain with these ids."""
        ...

    def flush(self) -> str:
        """The rest, when no more ids come."""
        ...


class ByteTable:
    """Bytes of every token of a byte-level vocabulary, and the text of those that are whole characters."""

    __slots__ = ("bytes", "texts")

    def __init__(self, table: Sequence[bytes]) -> None:
        self.bytes = list(table)
        self.texts: list[str | None] = [_whole_text(piece) for piece in self.bytes]


def _whole_text(piece: bytes) -> str | None:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return None


class ByteDetokenizer:
    """A running UTF-8 decoder over a byte table. Ids outside it (padding of the vocabulary) say nothing."""

    __slots__ = ("_table", "_tail")

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._tail = b""

    def push(self, ids: Sequence[int]) -> str:
        table = self._table
        if len(ids) == 1 and not self._tail and ids[0] < len(table.texts):
            text = table.texts[ids[0]]
            if text is not None:
                return text
        size = len(table.bytes)
        fresh = self._tail + b"".join([table.bytes[id] for id in ids if id < size])
        text, used = codecs.utf_8_decode(fresh, "replace", False)
        self._tail = fresh[used:]
        return text

    def flush(self) -> str:
        text = self._tail.decode("utf-8", "replace")
        self._tail = b""
        return text


def _last_words(decode: Decode, before: Sequence[int]) -> tuple[list[int], str]:
    """The end of `before` and its text: as many ids as it takes to have any that begins with a whole character."""
    size = MAX_HELD
    while True:
        window = list(before[-size:])
        text = decode(window) if window else ""
        is_whole = bool(text) and not text.startswith(REPLACEMENT)
        if is_whole or size >= len(before):
            return window, text
        size *= 4


class WindowDetokenizer:
    """Decodes a window of tokens with and without the fresh ones; `before` are ids the text continues."""

    __slots__ = ("_decode", "_window", "_num_told", "_told")

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window, self._told = _last_words(decode, before)
        self._num_told = len(self._window)

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push_one(id) for id in ids])

    def _push_one(self, id: int) -> str:
        self._window.append(id)
        text = self._decode(self._window)
        is_held = text.endswith(REPLACEMENT) and len(self._window) - self._num_told < MAX_HELD
        if is_held or len(text) <= len(self._told):
            return ""
        return self._tell(text)

    def _tell(self, text: str) -> str:
        fresh = text[len(self._told) :]
        self._window = self._window[self._num_told :]
        self._num_told = len(self._window)
        self._told = self._decode(self._window)
        return fresh

    def flush(self) -> str:
        text = self._decode(self._window)
        return self._tell(text) if len(text) > len(self._told) else ""
