"""Azure's LLM inference traces: CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

Timestamps carry seven digits (100 ns), one more than a datetime keeps, and may end in a zone. Files that copy the
columns without the times (TIMESTAMP is "XXX") are length files: their rows come without an instant.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TextIO

from penstock.traffic.rows import Drop, Row, Source, csv_rows, size_row

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def parse_instant(text: str, origin: datetime) -> float:
    """Seconds from `origin` to a timestamp, all of its digits used."""
    whole, _, rest = text.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    moment = datetime.fromisoformat(whole + rest[len(digits) :])
    since = moment - origin
    return since.days * 86400 + since.seconds + (int(digits) / 10 ** len(digits) if digits else 0.0)


def read(file: TextIO, source: Source) -> Iterator[Row | Drop]:
    """Rows in file order; `at_s` counts from midnight of the first row's day, exact to the traced digit."""
    origin: datetime | None = None
    for record in csv_rows(file):
        stamp = (record["TIMESTAMP"] or "").strip()
        try:
            sizes = int(record["ContextTokens"]), int(record["GeneratedTokens"])
            if stamp == "XXX":
                yield size_row(Row(None, *sizes))
                continue
            if origin is None:
                first = datetime.fromisoformat(stamp)
                origin = first.replace(hour=0, minute=0, second=0, microsecond=0)
            at_s = parse_instant(stamp, origin)
        except (TypeError, ValueError):
            yield Drop("unreadable row", ",".join(str(value) for value in record.values()))
            continue
        yield size_row(Row(at_s, *sizes))
