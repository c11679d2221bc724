"""The project's own trace file: JSON lines that keep what no published format can hold.

Keys are Mooncake's (`timestamp` in ms, `input_length`, `output_length`, `hash_ids`) and beside them

    block_tokens    tokens that one hash id stands for; ids may cover less than the prompt
    tenant, session, priority, slo, images    as in `rows.Row`
    flow, kind, after, wait_s, abandon_s      lines of one `flow` number stand together and are one workflow

`timestamp` of a call that waits for others is where it would begin at `workflow.NOMINAL_S_PER_TOKEN`, for readers
that know only Mooncake's keys. `at_s` and `start_s` (of the flow) keep all digits, so that what is written is read back
equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, TextIO, get_args

from penstock.core.types import Slo
from penstock.traffic.rows import Drop, Flow, FlowKind, Found, Row, Source, Step, size_row
from penstock.traffic.workflow import check_order, instants_of_flow

COLUMNS = ("timestamp", "input_length", "output_length", "hash_ids", "block_tokens")
KINDS = get_args(FlowKind)
SLO_KEYS = ("ttft_s", "tpot_s", "deadline_s", "weight")


def lines_of(found: Row | Flow, number: int) -> Iterator[str]:
    """The lines that say it. `number` sets a flow apart from its neighbours."""
    if isinstance(found, Row):
        assert found.at_s is not None
        yield json.dumps(_told(found, found.at_s))
        return
    for step, at_s in zip(found.steps, instants_of_flow(found), strict=True):
        record = _told(step.row, at_s)
        record |= {"flow": number, "kind": found.kind, "start_s": found.at_s}
        if step.after:
            record["after"] = list(step.after)
        if step.wait_s:
            record["wait_s"] = step.wait_s
        if step.abandon_s is not None:
            record["abandon_s"] = step.abandon_s
        yield json.dumps(record)


def _told(row: Row, at_s: float) -> dict[str, object]:
    record: dict[str, object] = {
        "timestamp": at_s * 1000,
        "input_length": row.num_prompt,
        "output_length": row.num_output,
        "hash_ids": list(row.hash_ids),
        "block_tokens": row.traced_size,
        "at_s": at_s,
        "tenant": row.tenant,
    }
    if row.session is not None:
        record["session"] = row.session
    if row.priority is not None:
        record["priority"] = row.priority
    if row.images:
        record["images"] = list(row.images)
    if row.slo is not None:
        bounds = {name: getattr(row.slo, name) for name in SLO_KEYS}
        record["slo"] = {name: value for name, value in bounds.items() if value is not None}
    return record


def read(file: TextIO, source: Source) -> Iterator[Found]:
    held: list[Step] = []
    kind: FlowKind = "call"
    start_s, number = 0.0, None
    for line in file:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            row = _row(record)
            flow = record.get("flow")
            step = _step(record, row)
        except (TypeError, ValueError, KeyError):
            yield Drop("unreadable row", line.strip())
            continue
        if held and flow != number:
            yield _flow(held, kind, start_s)
            held = []
        if flow is None:
            yield size_row(row)
            continue
        held.append(step)
        kind, start_s, number = record["kind"], float(record["start_s"]), flow
    if held:
        yield _flow(held, kind, start_s)


def _row(record: dict[str, Any]) -> Row:
    slo, session, priority = (record.get(name) for name in ("slo", "session", "priority"))
    at_s = record.get("at_s")
    return Row(
        float(record["timestamp"]) / 1000 if at_s is None else float(at_s),
        int(record["input_length"]),
        int(record["output_length"]),
        str(record.get("tenant", "default")),
        tuple(map(int, record["hash_ids"])),
        session=None if session is None else str(session),
        traced_size=int(record["block_tokens"]),
        slo=None if slo is None else Slo(**slo),
        priority=None if priority is None else int(priority),
        images=tuple(map(int, record.get("images", ()))),
    )


def _step(record: dict[str, Any], row: Row) -> Step:
    abandon_s, wait_s = record.get("abandon_s"), float(record.get("wait_s", 0.0))
    if not 0 <= wait_s < math.inf or (abandon_s is not None and not abandon_s > 0):
        raise ValueError("a wait is not negative, and nobody gives up before asking")
    if "flow" in record and record["kind"] not in KINDS:
        raise ValueError(f"no such kind: {record['kind']!r}")
    after = tuple(map(int, record.get("after", ())))
    return Step(row, after, wait_s, None if abandon_s is None else float(abandon_s))


def _flow(steps: list[Step], kind: FlowKind, start_s: float) -> Flow | Drop:
    if not math.isfinite(start_s):
        return Drop("a workflow without a finite time", str(start_s))
    try:
        check_order([step.after for step in steps])
    except ValueError as error:
        return Drop(f"a workflow out of order: {error}")
    if any(isinstance(size_row(step.row), Drop) for step in steps):
        return Drop("a workflow with an empty prompt or answer")
    return Flow(start_s, kind, tuple(steps))
