"""BurstGPT: CSV with Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type.

Later releases insert "Session ID" and "Elapsed time", so columns are found by name. A response of 0 tokens is a call
that failed at the source: dropped and counted as that. The tenant is the model and the class of caller, as in
"ChatGPT/conversation" and "GPT-4/api", because their lengths and burstiness differ.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TextIO

from penstock.traffic.rows import Drop, Row, Source, size_row

COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")


def tenant_of(model: str, log_type: str) -> str:
    """("GPT-4", "API log") is "GPT-4/api"."""
    caller = log_type.strip().lower().removesuffix("log").strip() or "unknown"
    return f"{model.strip() or 'unknown'}/{caller}"


def read(file: TextIO, source: Source) -> Iterator[Row | Drop]:
    for record in csv.DictReader(file):
        try:
            row = Row(
                float(record["Timestamp"]),
                int(record["Request tokens"]),
                int(record["Response tokens"]),
                tenant_of(record["Model"], record["Log Type"]),
            )
        except (TypeError, ValueError, AttributeError):
            yield Drop("unreadable row", ",".join(str(value) for value in record.values()))
            continue
        if row.num_output == 0 and row.num_prompt > 0:
            yield Drop("failed at the source (0 response tokens)")
            continue
        yield size_row(row)
