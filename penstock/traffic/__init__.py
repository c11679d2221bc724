"""Requests from somewhere: published traces, read as they stream past.

Refuses: timing. A trace yields `(at_s, Request)`; whoever plays it sleeps.

    for at_s, request in open_trace("azure.csv", speed=2.0, limit=1000): ...

`at_s` counts seconds from the first kept row. A trace counts what it kept and what it dropped, and why, in its `meta`.
"""

from penstock.traffic.trace import Trace, TraceMeta, open_trace

__all__ = ["Trace", "TraceMeta", "open_trace"]
