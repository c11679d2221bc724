"""A Page in the terminal: tiles as one table, tables and words as they are; charts are for the browser."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from penstock.report.page import Grid, Page, Tile, Words, number

MAX_ROWS = 12
MAX_CELL = 60


def print_page(page: Page, *, console: Console | None = None) -> None:
    """To stdout unless told otherwise."""
    out = console or Console()
    out.print(Text(page.title, style="bold"))
    for line in (page.banner, page.subtitle):
        if line:
            out.print(Text(line, style="yellow" if line == page.banner else ""))
    if page.tiles:
        out.print(_tiles(page.tiles))
    for block in page.blocks:
        if isinstance(block, Grid):
            out.print(_grid(block))
        elif isinstance(block, Words):
            out.print(Text(f"\n{block.title}", style="bold"))
            for line in block.lines:
                out.print(Text(f"- {line}" if block.is_list else line))
    for note in page.notes:
        out.print(Text(f"note: {note}", style="dim"))


def render(page: Page, width: int = 120) -> str:
    """The same as plain text, for files and tests."""
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        print_page(page, console=console)
    return capture.get()


def _tiles(tiles: tuple[Tile, ...]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("")
    styles = {"good": "green", "bad": "red", "": ""}
    for tile in tiles:
        table.add_row(tile.label, Text(tile.value, style=styles[tile.mood]), tile.note)
    return table


def _grid(grid: Grid) -> Table:
    table = Table(
        title=f"\n{grid.title}", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for place, name in enumerate(grid.columns):
        is_number = any(isinstance(row[place], int | float) for row in grid.rows)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in grid.rows[:MAX_ROWS]:
        table.add_row(*(Text(_short(number(cell))) for cell in row))
    if len(grid.rows) > MAX_ROWS:
        table.caption = f"and {len(grid.rows) - MAX_ROWS} more"
        table.caption_justify = "left"
    return table


def _short(text: str) -> str:
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"
