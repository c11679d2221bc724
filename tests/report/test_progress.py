"""Progress: a bar on a terminal, lines elsewhere, and never a word on stdout."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from penstock.report.progress import Bar


def shown(is_terminal: bool, line_every: int | None = None) -> str:
    told = io.StringIO()
    console = Console(file=told, force_terminal=is_terminal, width=100)
    with Bar("answered", line_every=line_every, console=console) as bar:
        for done in range(1, 7):
            bar.show(done, 6, f"[{done}] running")
    return told.getvalue()


def test_a_terminal_gets_a_bar_that_goes_away(capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(is_terminal=True)
    assert "answered" in told and "6/6" in told and "[6] running" in told and "━" in told
    assert told.endswith("\x1b[2K"), "the bar is wiped away at the end"
    assert capsys.readouterr().out == ""


def test_elsewhere_lines_are_few_and_plain() -> None:
    assert shown(is_terminal=False) == ""
    assert shown(is_terminal=False, line_every=3) == (
        "answered 3/6  [3] running\nanswered 6/6  [6] running\n"
    )


def test_stdout_stays_the_programs_own(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with Bar("x", console=console) as bar:
        bar.show(1, None)
        print("the result")
    assert capsys.readouterr().out == "the result\n"
