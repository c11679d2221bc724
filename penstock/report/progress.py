"""How far a long run is, on stderr: a bar where that is a terminal, else now and then a line, for logs of CI.

Nothing of it reaches stdout, which belongs to the result.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """Use it inside `with`. `line_every`: where no bar can be shown, every so manieth call is a line; None = none."""

    def __init__(
        self, name: str, *, line_every: int | None = None, console: Console | None = None
    ) -> None:
        self._name, self._line_every = name, line_every
        self._console = console or Console(stderr=True)
        self._calls = 0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[told]}", markup=False),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=None, told="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, done: int, total: int | None, told: str = "") -> None:
        """`done` of `total` (None: nobody knows), and what else there is to say."""
        if self._console.is_terminal:
            self._progress.update(self._task, completed=done, total=total, told=told)
            return
        self._calls += 1
        if self._line_every is not None and self._calls % self._line_every == 0:
            counted = f"{done:,}" if total is None else f"{done:,}/{total:,}"
            line = f"{self._name} {counted}  {told}".rstrip()
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
