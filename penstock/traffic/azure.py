"""Azure's LLM inference traces: CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

Timestamps carry seven digits (100 ns), one more than a datetime keeps, and may end in a zone. Files that copy the
columns without the times (TIMESTAMP is "XXX") are length files: their rows come without an instant.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from datetime import datetime
from typing import TextIO

from penstock.traffic.rows import Drop, Row, Source, csv_lines, size_row

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def parse_instant(text: str, origin: datetime) -> float:
    """Seconds from `origin` to a timestamp, all of its digits used."""
    whole, _, rest = text.partition(".")
    if rest.isascii() and rest.isdigit():
        digits = rest
    else:
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        whole += rest[len(digits) :]
    return _whole_seconds(whole, origin) + (int(digits) / 10 ** len(digits) if digits else 0.0)


@functools.lru_cache(maxsize=64)  # neighbours in a busy trace fall into one second
def _whole_seconds(text: str, origin: datetime) -> int:
    since = datetime.fromisoformat(text) - origin
    return since.days * 86400 + since.seconds


def read(file: TextIO, source: Source) -> Iterator[Row | Drop]:
    """Rows in file order; `at_s` counts from midnight of the first row's day, exact to the traced digit."""
    origin: datetime | None = None
    records = csv.reader(csv_lines(file))
    names = next(records, [])
    stamp_at, prompt_at, output_at = map(names.index, COLUMNS)
    for record in records:
        if not record:
            continue
        try:
            stamp = record[stamp_at].strip()
            num_prompt, num_output = int(record[prompt_at]), int(record[output_at])
            at_s: float | None = None
            if stamp != "XXX":
                if origin is None:
                    first = datetime.fromisoformat(stamp)
                    origin = first.replace(hour=0, minute=0, second=0, microsecond=0)
                at_s = parse_instant(stamp, origin)
        except (IndexError, TypeError, ValueError):
            yield Drop("unreadable row", ",".join(record))
            continue
        yield size_row(Row(at_s, num_prompt, num_output))
