"""What every reader yields: a Row, or a Drop that says why a row of the file is not one.

A reader is a generator over the lines of one format. It knows its columns and nothing else: limits, speeds, ids
and requests are made of its rows in `traffic.trace`. Adding a format is one file here and one line in `FORMATS`.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from penstock.core.errors import BadTrace


class Row(NamedTuple):
    """One request as traced. `at_s` is in the file's own origin; None when the file has no times."""

    at_s: float | None
    num_prompt: int
    num_output: int
    tenant: str = "default"
    hash_ids: tuple[int, ...] = ()


class Drop(NamedTuple):
    """A row that is no request. `shown` is set when the row could not be read: its beginning, for the report."""

    reason: str
    shown: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """What readers need beside the text."""

    name: str
    count_tokens: Callable[[str], int]


Reader = Callable[[TextIO, Source], Iterator[Row | Drop]]


def open_text(path: Path) -> TextIO:
    """The file as text, unpacked when it is gzip. Raises BadTrace when it cannot be opened."""
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        if is_gzip:
            return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise BadTrace(f"cannot open the trace {path}: {error.strerror or error}") from None


def size_row(row: Row) -> Row | Drop:
    """The row, or a Drop when it has nothing to prefill or nothing to say."""
    if row.num_prompt < 1:
        return Drop("no prompt tokens")
    if row.num_output < 1:
        return Drop("no output tokens")
    return row
