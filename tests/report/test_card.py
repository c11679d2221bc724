"""Cards for people: what is on them, and the pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from penstock.core.errors import BadConfig
from penstock.report.card import card_view, plot_card, short, sparkline
from penstock.traffic import open_trace
from penstock.traffic.card import card_of

DATA = Path(__file__).parents[2] / "data"
MOONCAKE, BURSTGPT = DATA / "mooncake_conversation_100.jsonl", DATA / "burstgpt_schema_120.csv"


def rendered(path: Path, **options: object) -> str:
    console = Console(width=100, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(card_view(card_of(open_trace(path, **options))))  # type: ignore[arg-type]
    return capture.get()


def test_sparklines() -> None:
    assert sparkline([0, 1, 4, 8]) == " ▂▅█"
    assert sparkline([0.001, 100]) == "▁█"
    assert sparkline([]) == "" and sparkline([0, 0]) == "  "


def test_all_of_it_is_shown() -> None:
    card = card_of(open_trace(BURSTGPT))
    told = rendered(BURSTGPT)
    assert f"{card.rows_kept:,} of {card.rows_read:,} rows" in told
    for why, count in card.drops.items():
        assert f"dropped {count:,}" in told and why in told
    assert f"{card.num_tenants}; {card.top_tenant}" in told and "not told by the trace" in told
    assert card.sha256 is not None and card.sha256[:40] in told
    assert "█" in told
    assert "not read to its end" in rendered(BURSTGPT, limit=5)


def test_prefixes_are_shown_where_the_trace_tells() -> None:
    card = card_of(open_trace(MOONCAKE))
    assert f"{card.hit_ceiling_blocks:.1%} of blocks" in rendered(MOONCAKE)
    assert f"prefix-hit ceiling {card.hit_ceiling_tokens:.1%}" in short(card)


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    card = card_of(open_trace(MOONCAKE))
    plot_card(card, tmp_path / "card.png")
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadConfig, match="cannot write the picture"):
        plot_card(card, DATA / "README.md" / "card.png")


def test_names_are_no_markup(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens,tenant,session\n0,5,5,[/x],\n")
    assert "1; [/x] 100.0%" in rendered(path)
