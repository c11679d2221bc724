"""A CSV of one's own: which of its columns mean what.

    --columns arrival=ts,prompt=in_tokens,output=out_tokens,tenant=team,session=chat

`arrival` may be left out (the trace then needs a rate), `tenant` and `session` too. Times are ISO timestamps or
numbers. The unit of a number is what the column's name ends with (`start_ms`, `ts_us`, `at_s`) or what is said after a
second colon (`arrival=ts:ms`); else numbers as large as an instant of our century are taken for Unix time in seconds,
ms, us or ns, whichever that is, and smaller ones for seconds. The first row decides for all of them.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TextIO

from penstock.core.errors import BadConfig, BadTrace
from penstock.traffic.azure import parse_instant
from penstock.traffic.rows import Drop, Reader, Row, Source, size_row

NAMES = ("arrival", "prompt", "output", "tenant", "session")
UNITS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
UNIX_FROM = (("ns", 1e17), ("us", 1e14), ("ms", 1e11))  # the year 1973 and later, in that unit
DELIMITERS = ",;\t|"
HINT = (
    "write --columns arrival=TIME,prompt=INPUT_TOKENS,output=OUTPUT_TOKENS[,tenant=..,session=..] with the names of "
    "the file's columns; a unit may follow the time, as in arrival=ts:ms (s, ms, us, ns, iso)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Names of columns. `unit`: of arrivals; None finds out."""

    prompt: str
    output: str
    arrival: str | None = None
    tenant: str | None = None
    session: str | None = None
    unit: str | None = None

    def named(self) -> list[str]:
        told = (self.arrival, self.prompt, self.output, self.tenant, self.session)
        return [name for name in told if name is not None]


OWN = Columns(
    arrival="arrival_s",
    prompt="prompt_tokens",
    output="output_tokens",
    tenant="tenant",
    session="session",
)  # what `penstock trace generate` writes


def parse_columns(text: str) -> Columns:
    """Read `arrival=ts,prompt=in,output=out`. Raises BadConfig."""
    given: dict[str, str] = {}
    for each in text.split(","):
        name, equals, column = each.partition("=")
        name = name.strip()
        if not equals or not column.strip():
            raise BadConfig(f"--columns: {each!r} does not say NAME=COLUMN", hint=HINT)
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            told = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(NAMES)}"
            raise BadConfig(f"--columns: unknown name {name!r}; {told}", hint=HINT)
        given[name] = column.strip()
    missing = [name for name in ("prompt", "output") if name not in given]
    if missing:
        raise BadConfig(f"--columns does not say which column is {missing[0]!r}", hint=HINT)
    arrival, colon, unit = given.get("arrival", "").rpartition(":")
    if colon and unit in (*UNITS, "iso"):
        return Columns(**{**given, "arrival": arrival, "unit": unit})
    return Columns(**given)


def open_rows(file: TextIO) -> csv.DictReader[str]:
    """The file's records, whatever separates its columns: the likeliest of DELIMITERS in its first line."""
    head = next((line for line in file if line.strip()), "")
    delimiter = max(DELIMITERS, key=head.count)
    names = next(csv.reader(io.StringIO(head), delimiter=delimiter), [])
    return csv.DictReader(file, [name.strip() for name in names], delimiter=delimiter)


def check(columns: Columns, found: Sequence[str], path: str) -> None:
    """Raises BadTrace that lists the file's columns when one that is named is not among them."""
    for name in columns.named():
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
            told = f"; did you mean {near[0]!r}?" if near else ""
            raise BadTrace(
                f"{path} has no column {name!r}{told}. It has {', '.join(map(repr, found))}",
                hint=HINT,
            )


def unit_of(column: str, text: str) -> str:
    """The unit of a column of times, from its name and one of its values. Raises ValueError for what is no time."""
    try:
        value = float(text)
    except ValueError:
        datetime.fromisoformat(text.strip())
        return "iso"
    tail = column.lower().replace("(", "_").rstrip(")").rpartition("_")[2]
    if tail in UNITS:
        return tail
    return next((unit for unit, least in UNIX_FROM if abs(value) >= least), "s")


def clock_of(unit: str) -> Callable[[str], float]:
    """Reads a time of that unit as seconds, exact to the microsecond at least."""
    if unit != "iso":
        scale = UNITS[unit]
        return lambda text: float(text) * scale
    origin: datetime | None = None

    def parse(text: str) -> float:
        nonlocal origin
        if origin is None:
            first = datetime.fromisoformat(text.strip())
            origin = first.replace(hour=0, minute=0, second=0, microsecond=0)
        return parse_instant(text.strip(), origin)

    return parse


def reader_with(columns: Columns) -> Reader:
    """A reader of files with these columns."""

    def read(file: TextIO, source: Source) -> Iterator[Row | Drop]:
        records = open_rows(file)
        check(columns, records.fieldnames or (), source.name)
        clock: Callable[[str], float] | None = None
        for record in records:
            try:
                at_s = None
                if columns.arrival is not None:
                    text = record[columns.arrival]
                    if clock is None:
                        clock = clock_of(columns.unit or unit_of(columns.arrival, text))
                    at_s = clock(text)
                row = _row(columns, record, at_s)
            except (TypeError, ValueError, AttributeError):
                shown = ",".join(str(value) for value in record.values())
                yield Drop("unreadable row", shown)
                continue
            yield size_row(row)

    return read


def _row(columns: Columns, record: dict[str, str], at_s: float | None) -> Row:
    tenant = record[columns.tenant].strip() if columns.tenant is not None else ""
    session = record[columns.session].strip() if columns.session is not None else ""
    return Row(
        at_s,
        _count(record[columns.prompt]),
        _count(record[columns.output]),
        tenant or "default",
        session=session or None,
    )


def _count(text: str) -> int:
    """A count of tokens: spreadsheets write 12.0 for 12."""
    value = float(text)
    if not value.is_integer():
        raise ValueError(f"{text!r} is no count of tokens")
    return int(value)


def read(file: TextIO, source: Source) -> Iterator[Row | Drop]:
    """The columns that `penstock trace generate` writes."""
    return reader_with(OWN)(file, source)  # type: ignore[return-value]
