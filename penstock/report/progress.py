"""How far a long run is, on stderr: a bar where that is a terminal, else now and then a line, for logs of CI.

Nothing of it reaches stdout, which belongs to the result. rich is imported when there is something to show: it takes
a tenth of a second, and a run in a script shows nothing.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

FORCED_BY = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")  # rich takes a pipe for a terminal


class Bar:
    """Use it inside `with`. `line_every`: where no bar can be shown, every so manieth call is a line; None = none."""

    def __init__(
        self, name: str, *, line_every: int | None = None, console: Console | None = None
    ) -> None:
        self._name, self._line_every = name, line_every
        if console is None and _may_be_terminal():
            console = _stderr()
        self._console = console
        self._calls = 0
        self._progress: Progress | None = None
        if console is not None and console.is_terminal:
            self._progress = _progress(console)
            self._task = self._progress.add_task(name, total=None, told="")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, done: int, total: int | None, told: str = "") -> None:
        """`done` of `total` (None: nobody knows), and what else there is to say."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total, told=told)
            return
        self._calls += 1
        if self._line_every is not None and self._calls % self._line_every == 0:
            counted = f"{done:,}" if total is None else f"{done:,}/{total:,}"
            line = f"{self._name} {counted}  {told}".rstrip()
            console = self._console = self._console or _stderr()
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _may_be_terminal() -> bool:
    return sys.stderr.isatty() or any(name in os.environ for name in FORCED_BY)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _progress(console: Console) -> Progress:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[told]}", markup=False),
        console=console,
        transient=True,
        redirect_stdout=False,
    )
