"""What every reader yields: a Row, or a Drop that says why a row of the file is not one, or a Flow of rows that wait
for each other.

A reader is a generator over the lines of one format. It knows its columns and nothing else: limits, speeds, ids
and requests are made of its rows in `traffic.trace`. Adding a format is one file here and one line in `FORMATS`.
A workload file is read in the same way: it yields rows that nobody traced.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from penstock.core.errors import BadTrace
from penstock.core.types import Slo

MOST_TOKENS = 2**31  # of a prompt or an answer: more is a slip of the file
UNREADABLE = (
    UnicodeDecodeError,
    EOFError,
    OSError,
    csv.Error,
    zlib.error,
)  # what a broken file raises
TRACED_SIZE = 512  # tokens of the run that one of Mooncake's hash ids stands for
FlowKind = Literal["session", "program", "call"]


class Row(NamedTuple):
    """One request as traced. `at_s` is in the file's own origin; None when the file has no times.

    `hash_ids` may cover less than the prompt: what they leave out is shared with nobody. `session` names the
    conversation or program that the row belongs to. `slo` and `priority` are None where the file promises nothing.
    `images`: tokens that each image of the prompt stands for, among `num_prompt`.
    """

    at_s: float | None
    num_prompt: int
    num_output: int
    tenant: str = "default"
    hash_ids: tuple[int, ...] = ()
    session: str | None = None
    traced_size: int = TRACED_SIZE
    slo: Slo | None = None
    priority: int | None = None
    images: tuple[int, ...] = ()


class Step(NamedTuple):
    """One row of a Flow: asked for `wait_s` after the end of the steps `after` (or after the flow's start).

    The row's own `at_s` is not looked at. `abandon_s`: its caller gives up after so long; None never does.
    """

    row: Row
    after: tuple[int, ...] = ()
    wait_s: float = 0.0
    abandon_s: float | None = None


class Flow(NamedTuple):
    """Rows that wait for each other: a conversation, an agent program, or one call whose caller may give up."""

    at_s: float
    kind: FlowKind
    steps: tuple[Step, ...]


class Drop(NamedTuple):
    """A row that is no request. `shown` is set when the row could not be read: its beginning, for the report."""

    reason: str
    shown: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """What readers need beside the text."""

    name: str
    count_tokens: Callable[[str], int]
    seed: int = 0
    rate_per_s: float | None = None


Found = Row | Flow | Drop
Reader = (
    Callable[[TextIO, Source], Iterator[Row | Drop]] | Callable[[TextIO, Source], Iterator[Found]]
)


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


def csv_lines(file: TextIO) -> Iterator[str]:
    """The lines of a CSV file from its head on."""
    return itertools.dropwhile(lambda line: not line.strip(), file)


def csv_rows(file: TextIO) -> csv.DictReader[str]:
    """Records of a CSV file with commas, by the names of its columns."""
    return csv.DictReader(csv_lines(file))


def size_row(row: Row) -> Row | Drop:
    """The row, or a Drop when it has nothing to prefill or nothing to say, or no instant or size that can be."""
    at_s, num_prompt, num_output = row[:3]
    if at_s is not None and not math.isfinite(at_s):
        return Drop("no finite time", str(at_s))
    if num_prompt > MOST_TOKENS or num_output > MOST_TOKENS:
        return Drop("more tokens than there can be", f"{num_prompt},{num_output}")
    if num_prompt < 1:
        return Drop("no prompt tokens")
    if num_output < 1:
        return Drop("no output tokens")
    if row.images and (min(row.images) < 1 or sum(row.images) >= num_prompt):
        return Drop("images that leave no room for text", str(row.images))
    return row
