"""Writes what a trace holds as a file that is a trace again.

`.jsonl` keeps everything (format "flows"). `.csv` keeps instants, lengths, tenants and sessions: calls that wait for
others are written at their nominal instants, and prefixes and images are lost.

The file is written beside its place and put there when it is whole: what stands there stays until then, so that neither
a stopped run nor a workload that reads the very file it is written to leaves half a trace.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from penstock.core.errors import BadConfig
from penstock.traffic.custom import OWN
from penstock.traffic.flows import lines_of
from penstock.traffic.rows import Row
from penstock.traffic.sources import opened
from penstock.traffic.trace import Trace

SUFFIXES = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz")


def write_trace(trace: Trace, path: Path, on_progress: Callable[[int], None] | None = None) -> None:
    """Write the file. `on_progress` hears how many requests it holds. Raises BadConfig when it cannot be written."""
    name = path.name.removesuffix(".gz")
    if not name.endswith((".jsonl", ".csv")):
        raise BadConfig(
            f"cannot tell what {path} is to be", hint=f"end it in {', '.join(SUFFIXES)}"
        )
    if path.exists() and path.samefile(trace.path):
        raise BadConfig(
            f"{path} would take the place of the trace it is made of", hint="write another file"
        )
    write = _write_csv if name.endswith(".csv") else _write_lines
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _opened(part, is_packed=path.suffix == ".gz") as file:
                write(trace, file, on_progress or (lambda number: None))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise BadConfig(f"cannot write {path}: {error.strerror or error}") from None


def _opened(path: Path, *, is_packed: bool) -> TextIO:
    if is_packed:
        return gzip.open(path, "wt", encoding="utf-8", newline="")
    return path.open("w", encoding="utf-8", newline="")


def _write_lines(trace: Trace, file: TextIO, on_progress: Callable[[int], None]) -> None:
    for number, at_s, found in trace.timed():
        for line in lines_of(found._replace(at_s=at_s), number):
            file.write(line + "\n")
        on_progress(trace.meta.rows_kept)


def _write_csv(trace: Trace, file: TextIO, on_progress: Callable[[int], None]) -> None:
    out = csv.writer(file, lineterminator="\n")
    out.writerow([OWN.arrival, OWN.prompt, OWN.output, OWN.tenant, OWN.session])
    found = ((at_s, each._replace(at_s=at_s)) for _, at_s, each in trace.timed())
    for at_s, row in opened(found):
        assert isinstance(row, Row)
        out.writerow([repr(at_s), row.num_prompt, row.num_output, row.tenant, row.session or ""])
        on_progress(trace.meta.rows_kept)
