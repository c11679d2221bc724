"""Requests from somewhere: published traces, CSV files of one's own, and workloads made from a description.

Refuses: timing. A trace yields `(at_s, Request)`, or `(at_s, Workflow)` for callers that wait for answers; whoever
plays it sleeps.

    for at_s, request in open_trace("azure.csv", speed=2.0, limit=1000): ...
    for at_s, item in open_trace("workload.toml", seed=3): ...

`at_s` counts seconds from the first kept row (from 0 in a workload). A trace counts what it kept and what it dropped,
and why, in its `meta`.
"""

from penstock.traffic.custom import Columns, parse_columns
from penstock.traffic.trace import Item, Trace, TraceMeta, open_trace
from penstock.traffic.workflow import Call, Workflow

__all__ = [
    "Call",
    "Columns",
    "Item",
    "Trace",
    "TraceMeta",
    "Workflow",
    "open_trace",
    "parse_columns",
]
