"""ShareGPT-style conversations: JSON lines, or one JSON array, of {"conversations": [{"from", "value"}, ...]}.

One conversation gives one request: its first human turn, answered by the turn after it. Later turns are left
out: nothing tells how long a reader thought before them. "from" is human or user and gpt, assistant or similar;
the newer spelling {"role", "content"} is read too. Sizes are what `count_tokens` says of the two texts; there are
no times.

An array is parsed one conversation at a time, so that a file of hundreds of megabytes needs no more memory than its
largest conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TextIO

from penstock.traffic.rows import Drop, Row, Source, size_row

KEYS = ("conversations", "conversation", "messages")
ASKERS = ("human", "user")
ANSWERERS = ("gpt", "assistant", "bing", "chatgpt", "bard")
READ_CHARS = 1 << 16
MAX_CHARS = 1 << 26  # of one conversation


def array_of(file: TextIO) -> Iterator[object]:
    """The values of one JSON array, each parsed when it is complete. Raises ValueError where it breaks."""
    decoder = json.JSONDecoder()
    text, want = file.read(READ_CHARS).lstrip().removeprefix("["), READ_CHARS
    while True:
        text = text.lstrip(" \t\r\n,")
        if text.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(text)
        except json.JSONDecodeError:
            # Cut inside a value: read as much again as is held, so that long values stay linear.
            more = file.read(want) if len(text) < MAX_CHARS else ""
            if not more:
                raise
            text, want = text + more, len(text)
            continue
        yield value
        text, want = text[end:], READ_CHARS
        if len(text) < READ_CHARS:
            text += file.read(READ_CHARS)


def turns_of(value: object) -> list[tuple[str, str]] | None:
    """(speaker, text) of each turn, None when the value is no conversation."""
    if not isinstance(value, dict):
        return None
    turns = next((value[key] for key in KEYS if key in value), None)
    if not isinstance(turns, list):
        return None
    told = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or not isinstance(text, str):
            return None
        told.append((speaker.lower(), text))
    return told


def _row_of(value: object, source: Source) -> Row | Drop:
    turns = turns_of(value)
    if turns is None:
        return Drop("not a conversation", json.dumps(value))
    for (asker, asked), (answerer, answer) in zip(turns, turns[1:], strict=False):
        if asker in ASKERS and answerer in ANSWERERS:
            return size_row(Row(None, source.count_tokens(asked), source.count_tokens(answer)))
    return Drop("no human turn with an answer")


def _rows_of_lines(file: TextIO, source: Source) -> Iterator[Row | Drop]:
    for line in file:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            yield Drop("unreadable row", line.strip())
            continue
        yield _row_of(value, source)


def read(file: TextIO, source: Source) -> Iterator[Row | Drop]:
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    if start != "[":
        yield from _rows_of_lines(file, source)
        return
    values = array_of(file)
    while True:
        try:
            value = next(values)
        except StopIteration:
            return
        except ValueError as error:
            # Behind broken JSON nothing can be told apart any more.
            yield Drop("broken JSON: the rest of the file is lost", str(error))
            return
        yield _row_of(value, source)
