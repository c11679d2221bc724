"""A Page in the terminal: tiles as one table, tables and words as they are; charts are for the browser."""

from __future__ import annotations

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from penstock.report.page import Grid, Page, Tile, Words, number

MAX_ROWS = 12
WIDE = 160  # columns of a terminal in which every column of a table is shown


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
            out.print(_grid(block, out.width))
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
        told = (Text(tile.label), Text(tile.value, style=styles[tile.mood]), Text(tile.note))
        table.add_row(*told)
    return table


def _grid(grid: Grid, width: int) -> Table:
    table = Table(
        title=Text(f"\n{grid.title}"),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    shown = range(len(grid.columns)) if grid.narrow is None or width >= WIDE else grid.narrow
    for place in shown:
        is_number = any(isinstance(row[place], int | float) for row in grid.rows)
        justify: JustifyMethod = "right" if is_number else "left"
        table.add_column(Text(grid.columns[place]), justify=justify, no_wrap=place == shown[0])
    for row in grid.rows[:MAX_ROWS]:
        table.add_row(*(Text(number(row[place])) for place in shown))
    if len(grid.rows) > MAX_ROWS:
        table.caption = f"and {len(grid.rows) - MAX_ROWS} more"
        table.caption_justify = "left"
    return table
