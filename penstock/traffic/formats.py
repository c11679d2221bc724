"""The formats that can be read, and how a file is recognised: by its column or key names, not by its file name.

Only a workload is known by its suffix, `.toml`, for it is a description and no data.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from penstock.core.errors import BadTrace
from penstock.traffic import azure, burstgpt, custom, flows, mooncake, sharegpt
from penstock.traffic.custom import Columns
from penstock.traffic.rows import UNREADABLE, Found, Reader, Source, open_text

WORKLOAD = "workload"


def _read_workload(file: TextIO, source: Source) -> Iterator[Found]:
    from penstock.traffic import workload  # its laws take long to import, and few traces are one

    return workload.read(file, source)


FORMATS: dict[str, Reader] = {
    "azure": azure.read,
    "mooncake": mooncake.read,
    "flows": flows.read,
    "burstgpt": burstgpt.read,
    **burstgpt.VARIANTS,
    "sharegpt": sharegpt.read,
    "csv": custom.read,
    WORKLOAD: _read_workload,
}
CSV_COLUMNS = {
    "azure": azure.COLUMNS,
    **dict.fromkeys(("burstgpt", *burstgpt.VARIANTS), burstgpt.COLUMNS),
    "csv": tuple(custom.OWN.named()),
}
HINT = (
    "readable are: azure (CSV with TIMESTAMP,ContextTokens,GeneratedTokens), burstgpt (CSV with Timestamp, Model, "
    "Request tokens, Response tokens, Log Type; or only its burstgpt-conversation or burstgpt-api rows, or "
    "burstgpt-with-failures), mooncake (JSON lines with timestamp, input_length, output_length, "
    "hash_ids), sharegpt (JSON or JSON lines with conversations), a workload (.toml); say which columns a CSV of your "
    "own has with --columns arrival=TIME,prompt=INPUT_TOKENS,output=OUTPUT_TOKENS"
)


def _json_format(line: str) -> str | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    if all(key in value for key in flows.COLUMNS):
        return "flows"
    if all(key in value for key in mooncake.COLUMNS):
        return "mooncake"
    return "sharegpt" if any(key in value for key in sharegpt.KEYS) else None


def _csv_format(line: str) -> str | None:
    columns = next(csv.reader([line]), [])
    fitting = (name for name, wanted in CSV_COLUMNS.items() if set(wanted) <= set(columns))
    return next(fitting, None)


def first_line(path: Path) -> str:
    """The first that is not blank. Raises BadTrace when there is none or the file is not text."""
    try:
        with open_text(path) as file:
            line = next((line for line in file if line.strip()), "").strip()
    except UNREADABLE as error:
        raise BadTrace(
            f"the trace {path} is not text that can be read: {error}",
            hint="a trace is text in UTF-8, packed with gzip or not",
        ) from None
    if not line:
        raise BadTrace(f"the trace {path} is empty")
    return line


def sniff(path: Path) -> str:
    """The name of the file's format. Raises BadTrace when it is empty or of none of those that its content shows."""
    line = first_line(path)
    guess: Callable[[str], str | None] = _json_format if line.startswith("{") else _csv_format
    found = "sharegpt" if line.startswith("[") else guess(line)
    if found is None:
        shown = line if len(line) <= 80 else line[:77] + "..."
        raise BadTrace(f"the trace {path} is of no known format; it begins {shown!r}", hint=HINT)
    return found


def reader_of(path: Path, name: str | None, columns: Columns | None = None) -> tuple[str, Reader]:
    """(name, reader) for a file, by `columns`, by `name` or by its content. Raises BadTrace when it does not fit."""
    if columns is not None:
        custom.check(
            columns, custom.open_rows(io.StringIO(first_line(path))).fieldnames or (), str(path)
        )
        return "csv", custom.reader_with(columns)
    if name is None and path.suffix == ".toml":
        name = WORKLOAD
    if name is None:
        return (name := sniff(path)), FORMATS[name]
    if name not in FORMATS:
        raise BadTrace(f"no trace format is named {name!r}", hint=HINT)
    elif name in CSV_COLUMNS:
        _check_columns(path, name)
    elif name == WORKLOAD:
        from penstock.traffic import workload

        workload.check(path)
    return name, FORMATS[name]


def _check_columns(path: Path, name: str) -> None:
    columns = next(csv.reader([first_line(path)]), [])
    missing = [column for column in CSV_COLUMNS[name] if column not in columns]
    if missing:
        raise BadTrace(
            f"the trace {path} lacks the column {missing[0]!r} of the format {name}", hint=HINT
        )
