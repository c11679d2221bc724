"""What a sweep says in words and shows in its table, on rows whose answer is known."""

from __future__ import annotations

from rich.console import Console

from penstock.report.sweep_page import sweep_page
from penstock.report.sweeps import is_drawn, lines_of, table, words

Row = dict[str, object]


def row(variant: str, load: float | None, seed: int = 0, **figures: object) -> Row:
    found: Row = {
        "variant": variant, "load_kind": None if load is None else "speed", "load": load,
        "offered_per_s": 2.0 if load is None else 2 * load, "seed": seed, "error": None,
        "attainment": 0.95, "worst_class": 0.9, "num_classes": 1, "goodput_per_s": 1.9,
        "worst_class_name": "priority 0, ttft 1 s", "ttft_mean_s": 0.1 + seed / 100, "ttft_p99_s": 0.5,
    }  # fmt: skip
    return found | figures


def shown(rows: list[Row]) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        console.print(table(rows))
    return capture.get()


def test_seeds_are_one_line_with_their_spread() -> None:
    rows = [row("a", 1.0, seed, goodput_per_s=value) for seed, value in enumerate((1.0, 2.0, 3.0))]
    (line,) = lines_of(rows)
    found = line.get("goodput_per_s")
    assert (found.mean, found.least, found.most) == (2.0, 1.0, 3.0)
    assert line.get("tpot_p99_s").mean is None
    told = shown(rows)
    assert (
        "2.00 ±50%" in told and "95.0%" in told and "500 ms" in told and "worst class" not in told
    )


def test_names_of_variants_are_no_markup() -> None:
    assert "order=[/x]" in shown([row("order=[/x]", 1.0)])


def test_worst_class_and_price_are_columns_where_there_are_any() -> None:
    rows = [
        row("a", load, num_classes=2, usd_per_million_tokens=1.5, attainment=0.99)
        for load in (1.0, 2.0)
    ]
    rows[1]["worst_class"] = 0.8
    told = shown(rows)
    assert "worst class" in told and "$/M tokens" in told
    assert "a carries at least 4/s, the highest load tried" in words(rows)
    assert any(
        "between 2 and 4), counting the class that attains least" in text for text in words(rows)
    )


def test_a_sweep_without_a_load_names_the_best() -> None:
    rows = [row("a", None, goodput_per_s=1.0), row("b", None, goodput_per_s=1.5)]
    assert words(rows)[0] == "b has the most goodput, 1.5x of a."
    close = [
        row(name, None, seed, goodput_per_s=value + seed)
        for name, value in (("a", 1.0), ("b", 1.5))
        for seed in (0, 1)
    ]
    assert "no clear winner" in words(close)[0]
    assert "equal goodput" in words([row("a", None), row("b", None)])[0]
    assert words([row("a", None)]) == []


def test_what_a_reader_must_know_is_said() -> None:
    same = [row("a", 1.0, seed, ttft_mean_s=0.1) for seed in range(3)]
    assert not is_drawn(same) and "nothing here is drawn by chance" in " ".join(words(same))
    drawn = [row("a", 1.0, seed) for seed in range(3)]
    assert is_drawn(drawn) and "drawn by chance" not in " ".join(words(drawn))
    free = [row("a", 1.0, worst_class_name="priority 0, no promise")]
    assert "No promise was stated" in " ".join(words(free))
    failed: Row = {**row("a", 2.0), "error": "it broke\n  hint: mend it"}
    for name in ("attainment", "goodput_per_s", "ttft_mean_s", "ttft_p99_s"):
        del failed[name]
    assert "1 of 2 points failed; the first says: it broke" in words([row("a", 1.0), failed])


def test_the_page_says_the_same_and_draws_what_was_carried() -> None:
    rows = [row("a", load, attainment=share) for load, share in ((1.0, 1.0), (2.0, 0.8))]
    rows = [{**each, "cost_model": "table"} for each in rows]
    page = sweep_page(rows, title="Sweep", subtitle="s")
    told = page.to_dict()
    assert [tile.value for tile in page.tiles] == ["3/s"]
    assert words(rows)[0] == "a carries 3/s (between 2 and 4)"
    (chart,) = [
        each
        for each in page.blocks
        if each.kind == "chart" and each.title == "Goodput against load"
    ]
    assert chart.kind == "chart" and chart.data[-1]["y"] == [2.0, 3.2]
    assert "nothing was run" in page.banner and told["notes"] == (
        "Step times come from the table.",
    )
