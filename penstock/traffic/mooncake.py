"""Mooncake's traces: JSON lines with timestamp (ms), input_length, output_length, hash_ids.

`hash_ids[i]` names the prefix up to and including the i-th block of 512 tokens: equal ids are equal prefixes, so
prefix caching can be studied without any text. A row whose ids do not cover its prompt is dropped, for its sharing
would be a guess.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TextIO

from penstock.traffic.rows import Drop, Row, Source, size_row

COLUMNS = ("timestamp", "input_length", "output_length", "hash_ids")
BLOCK_TOKENS = 512


def read(file: TextIO, source: Source) -> Iterator[Row | Drop]:
    for line in file:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            row = Row(
                float(record["timestamp"]) / 1000,
                int(record["input_length"]),
                int(record["output_length"]),
                hash_ids=tuple(int(id) for id in record["hash_ids"]),
            )
        except (TypeError, ValueError, KeyError):
            yield Drop("unreadable row", line.strip())
            continue
        if len(row.hash_ids) != -(-row.num_prompt // BLOCK_TOKENS):
            yield Drop("hash_ids do not cover the prompt")
            continue
        yield size_row(row)
