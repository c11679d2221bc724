"""Where mechanisms write their events: one file each in the log folder, or nowhere."""

from __future__ import annotations

from pathlib import Path

import penstock
from penstock.core.clock import wall_anchor
from penstock.core.events import Header
from penstock.core.ports import Log
from penstock.report.log import LogWriter, Null


def header_of(who: str, *, config: str, seed: int, profile: str = "") -> Header:
    """The first record of a log; needs a running loop for its anchor."""
    loop_at, wall_at = wall_anchor()
    return Header(
        version=penstock.__version__,
        who=who,
        config=config,
        seed=seed,
        profile=profile,
        loop_at=loop_at,
        wall_at=wall_at,
    )


def open_log(folder: Path | None, header: Header) -> Log:
    """The log of `header.who` in a folder, begun with its header; None = events are forgotten."""
    if folder is None:
        return Null()
    log = LogWriter(folder / f"{header.who.replace('/', '_')}.jsonl")
    log.emit(header)
    return log


def close_log(log: Log) -> None:
    if isinstance(log, LogWriter):
        log.close()
