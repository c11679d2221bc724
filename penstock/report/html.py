"""A Page as one HTML file that needs nothing else: style, script, data and plotly inside it, no network, no fonts.

The page follows the reader's colour scheme and has a button for the other one; charts carry tones ("1", "2",
"muted") and not colours, and the script of the page paints them from the style's variables, so that one file reads
well in both.
plotly (extra `lab`) is embedded once, and only when there is a chart.
"""

from __future__ import annotations

import importlib
import json
import re
from html import escape
from importlib import resources
from pathlib import Path

from penstock.core.errors import missing_extra
from penstock.report.files import write_text
from penstock.report.page import Block, Cell, Chart, Grid, Page, Tile, Words, number

MANY = 6  # columns that a small screen scrolls rather than squeezes
PERCENT = re.compile(r"[<>]?[\d.,]+%$")
__all__ = ["Chart", "Grid", "Page", "Tile", "Words", "render", "write"]


def render(page: Page) -> str:
    """The HTML text. Raises MissingExtra without plotly, when the page has charts."""
    charts = [block for block in page.blocks if isinstance(block, Chart)]
    data = [{"data": chart.data, "layout": chart.layout} for chart in charts]
    scripts = [_asset("page.js")]
    if charts:
        scripts.insert(0, plotly())
    shell = _asset("page.html")
    parts = {
        "title": escape(page.title),
        "style": _asset("page.css"),
        "subtitle": f'<p class="subtitle">{escape(page.subtitle)}</p>' if page.subtitle else "",
        "banner": f'<p class="banner" role="note">{escape(page.banner)}</p>' if page.banner else "",
        "tiles": "".join(map(_tile, page.tiles)),
        "blocks": _blocks(page.blocks),
        "notes": _notes(page.notes),
        "footer": escape(page.footer),
        "data": _json(data),
        "scripts": "".join(f"<script>{script}</script>\n" for script in scripts),
    }
    pieces = shell.split("{{")
    told = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        told += (parts[name], rest)
    return "".join(told)


def write(page: Page, path: Path | str) -> Path:
    """Write the page to a file, whose folder is made. Raises BadConfig when that cannot be done."""
    return write_text(path, render(page), what="the report")


def _asset(name: str) -> str:
    return (resources.files("penstock.report") / "assets" / name).read_text(encoding="utf-8")


def plotly() -> str:
    """The script that draws. Raises MissingExtra when it is not installed."""
    try:
        bundle: str = importlib.import_module("plotly.offline").get_plotlyjs()
    except ModuleNotFoundError:
        raise missing_extra("plotly", "lab") from None
    return bundle.replace("</script", "<\\/script")


def _json(value: object) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _tile(tile: Tile) -> str:
    mood = f" {tile.mood}" if tile.mood else ""
    note = f'<span class="note">{escape(tile.note)}</span>' if tile.note else ""
    return (
        f'<div class="tile{mood}"><span class="label">{escape(tile.label)}</span>'
        f'<span class="value">{escape(tile.value)}</span>{note}</div>'
    )


def _blocks(blocks: tuple[Block, ...]) -> str:
    told, place = [], 0
    for block in blocks:
        if isinstance(block, Chart):
            inner = (
                f'<div class="chart" data-chart="{place}" style="height:{block.height}px"></div>'
            )
            place += 1
        elif isinstance(block, Grid):
            inner = _grid(block)
        else:
            tag = ("<ul>", "</ul>", "li") if block.is_list else ("", "", "p")
            lines = "".join(f"<{tag[2]}>{escape(line)}</{tag[2]}>" for line in block.lines)
            inner = f"{tag[0]}{lines}{tag[1]}"
        caption = "" if isinstance(block, Words) else block.caption
        below = f'<p class="caption">{escape(caption)}</p>' if caption else ""
        wide = " wide" if block.is_wide else ""
        told.append(
            f'<section class="{block.kind}{wide}"><h2>{escape(block.title)}</h2>{inner}{below}</section>\n'
        )
    return "".join(told)


def _grid(grid: Grid) -> str:
    is_number = [any(_is_number(row[i]) for row in grid.rows) for i in range(len(grid.columns))]
    sides = ["n" if each else "t" for each in is_number]
    head = "".join(
        f'<th class="{side}" scope="col">{escape(name)}</th>'
        for side, name in zip(sides, grid.columns, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(map(_cell, row, sides)) + "</tr>"
        for row in grid.rows
    )  # fmt: skip
    many = ' class="many"' if len(grid.columns) > MANY else ""
    return f'<div class="scroll"><table{many}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _is_number(value: Cell) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and bool(PERCENT.match(value)))


def _cell(value: Cell, side: str) -> str:
    key = f' data-key="{value!r}"' if isinstance(value, int | float) else ""
    return f'<td class="{side}"{key}>{escape(number(value))}</td>'


def _notes(notes: tuple[str, ...]) -> str:
    if not notes:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"
