"""What a report says, before it has looks: tiles, charts, tables and words, in order. Plain data, ready for JSON.

`report.html.render` turns a Page into one file for a browser, `report.console.print_page` into tables of the terminal
and `Page.to_dict` into JSON; all three say the same. Charts are plotly figures as dictionaries; see `report.charts`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

Cell = str | int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One key figure of the head. `mood` colours it: good, bad, or neither."""

    label: str
    value: str
    note: str = ""
    mood: Literal["good", "bad", ""] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A plotly figure. Colours are named by tone in `meta` of each trace, so that the page can change its scheme.

    `caption` says how to read it. `is_wide` takes the whole width of the page.
    """

    title: str
    caption: str = ""
    data: tuple[dict[str, object], ...]
    layout: dict[str, object] = field(default_factory=dict)
    height: int = 340
    is_wide: bool = False
    kind: Literal["chart"] = "chart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table. Numbers are aligned to the right; None is shown as a dash. `narrow`: the columns for small terminals."""

    title: str
    caption: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    narrow: tuple[int, ...] | None = None
    is_wide: bool = True
    kind: Literal["grid"] = "grid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Paragraphs or, with `is_list`, points. `about`: the request whose life they tell."""

    title: str
    lines: tuple[str, ...]
    is_list: bool = False
    about: str = ""
    is_wide: bool = True
    kind: Literal["words"] = "words"


Block = Chart | Grid | Words


def number(value: Cell) -> str:
    """A cell for people: three or four digits that matter, thousands apart, "-" for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def kept(share: float | None) -> str:
    """A share for people, 100% only when nothing is missing and 0% only when nothing is there."""
    if share is None:
        return "-"
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A whole report. `banner` warns across the top ("SIMULATED: ..."); `figures` are for the JSON only."""

    title: str
    subtitle: str = ""
    banner: str = ""
    tiles: tuple[Tile, ...] = ()
    blocks: tuple[Block, ...] = ()
    notes: tuple[str, ...] = ()
    footer: str = ""
    figures: dict[str, object] = field(default_factory=dict)

    def lives(self) -> Page:
        """The page with nothing but the lives of the requests that were asked for."""
        told = tuple(each for each in self.blocks if isinstance(each, Words) and each.about)
        return dataclasses.replace(self, tiles=(), blocks=told, notes=())

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return dataclasses.asdict(self)
