"""Figures as tables: for the terminal, and as the section of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from penstock.lab.speed.figures import Digest, Figure, Ratio
from penstock.lab.speed.turns import OURS

TITLES = {
    "decode": "decode, one stream",
    "many": "many at once, in and out",
    "prefix cold": "first token, nothing shared",
    "prefix new": "first token, shared prefix is new",
    "prefix warm": "first token, shared prefix was seen",
    "start": "start to first token",
}
BEGIN, END = "<!-- table of penstock bench engine -->", "<!-- end of the table -->"


def title(measure: str) -> str:
    return TITLES.get(measure, f"{measure.replace('prefill', 'prefill of')} tokens")


def text_of(found: Digest) -> str:
    """For people at a terminal."""
    return "\n".join(
        [
            *_head(found),
            "",
            *_rows(found, _plain_row),
            "",
            *(f"  {name}: {about}" for name, about in found.abouts.items()),
            *_absent(found),
        ]
    )


def page_of(runs: Sequence[Digest]) -> str:
    """The part of a page between its two marks: a table a model."""
    parts = []
    for found in runs:
        names = _names(found)
        parts += [
            *_head(found),
            "",
            f"| | weights | threads | {' | '.join(names)} |",
            "|" + "---|" * (3 + len(names)),
            *_rows(found, _page_row),
            "",
            "; ".join(f"{name}: {about}" for name, about in found.abouts.items()),
            "",
            *_absent(found),
        ]
    return "\n".join(parts).rstrip()


def placed(page: str, section: str) -> str:
    """The page with the section between its marks. Raises ValueError when it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def _names(found: Digest) -> list[str]:
    return list(dict.fromkeys(one.engine for one in found.figures))


def _head(found: Digest) -> Iterator[str]:
    reads = ", ".join(
        f"{speed / 1e9:.1f} GB/s by {threads}"
        for threads, speed in sorted(found.read_bytes_s.items())
    )
    yield f"{found.model} on {found.machine.get('processor', 'this machine')}; a plain read gets {reads}"


def _rows(found: Digest, row: object) -> Iterator[str]:
    assert callable(row)
    keys = dict.fromkeys((one.measure, one.weights, one.threads) for one in found.figures)
    for measure, weights, threads in keys:
        figures = {
            one.engine: one
            for one in found.figures
            if (one.measure, one.weights, one.threads) == (measure, weights, threads)
        }
        ratios = {
            one.peer: one
            for one in found.ratios
            if (one.measure, one.weights, one.threads) == (measure, weights, threads)
        }
        yield from row(found, figures, ratios)


def _plain_row(
    found: Digest, figures: dict[str, Figure], ratios: dict[str, Ratio]
) -> Iterator[str]:
    first = next(iter(figures.values()))
    by = "processor" if _by_processor(first) else "wall"
    by += ", 5th percentile" if first.threads > 1 else ""
    yield f"{title(first.measure)}  {first.weights}  {first.threads} threads  ({first.unit}, {by})"
    for name, one in figures.items():
        told = f"  {name:24}{_number(one.value):>10}  [{_number(one.low)} .. {_number(one.high)}]"
        if name in ratios:
            told += f"  ours {_ratio(ratios[name])}"
        share = found.roofs.get((name, one.threads, one.weights))
        if one.measure == "decode" and share is not None:
            told += f"  {share[0]:.0%} of the roof [{share[1]:.0%} .. {share[2]:.0%}]"
        if one.others is not None:
            told += f"  others took {one.others:.0%}"
        yield told


def _page_row(found: Digest, figures: dict[str, Figure], ratios: dict[str, Ratio]) -> Iterator[str]:
    first = next(iter(figures.values()))
    cells = []
    for name in _names(found):
        one = figures.get(name)
        if one is None:
            cells.append("-")
            continue
        told = _number(one.value) + (" s" if one.unit == "s" else "")
        share = found.roofs.get((name, one.threads, one.weights))
        if one.measure == "decode" and share is not None:
            told += f", {share[0]:.0%} of the roof"
        if name in ratios:
            told += f"; **{_ratio(ratios[name])}**"
        elif name == OURS:
            told += f" ({_number(one.low)} to {_number(one.high)})"
        cells.append(told)
    yield (
        "| " + " | ".join([title(first.measure), first.weights, str(first.threads), *cells]) + " |"
    )


def _by_processor(one: Figure) -> bool:
    return one.threads == 1 and not one.measure.startswith("prefix")


def _absent(found: Digest) -> Iterator[str]:
    for why in dict.fromkeys((each["engine"], each["why"]) for each in found.absent):
        some = [each for each in found.absent if (each["engine"], each["why"]) == why]
        what = ", ".join(dict.fromkeys(f"{each['measure']} {each['weights']}" for each in some))
        yield f"not run: {why[0]} ({what}): {why[1]}"


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(one: Ratio) -> str:
    return f"{one.value:.2f}x ({one.low:.2f} to {one.high:.2f})"
