"""Images in workloads: how many there are, what becomes of them in files and requests, and what a card says."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.errors import BadConfig
from penstock.core.types import Request
from penstock.report.card import short
from penstock.traffic import open_trace
from penstock.traffic.card import card_of
from penstock.traffic.written import write_trace

WORKLOAD = """
num_requests = 4000
[arrivals]
kind = "poisson"
rate_per_s = 10.0
[lengths]
kind = "fixed"
prompt = 50
output = 20
[images]
share = 0.6
number = {kind = "geometric", mean = 2.0, most = 50}
tokens = {kind = "choice", values = [256, 1024], weights = [3, 1]}
"""


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "shown.toml"
    path.write_text(WORKLOAD)
    return path


def test_draws_follow_what_is_stated(workload: Path) -> None:
    requests = [item for _, item in open_trace(workload) if isinstance(item, Request)]
    shown = [request for request in requests if request.parts]
    sizes = [part.num_tokens for request in shown for part in request.parts]
    assert len(shown) / len(requests) == pytest.approx(0.6, abs=0.03)
    assert len(sizes) / len(shown) == pytest.approx(2.0, abs=0.1)
    assert sizes.count(1024) / len(sizes) == pytest.approx(0.25, abs=0.03)
    for request in requests:
        images = sum(part.num_tokens for part in request.parts)
        assert request.prompt.num_tokens == 50 + images
        if request.parts:  # they end the prompt, one behind the other
            assert request.parts[0].start == 50
            last = request.parts[-1]
            assert last.start + last.num_tokens == request.prompt.num_tokens


def test_lengths_are_what_they_were_without_images(workload: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.toml"
    plain.write_text(WORKLOAD[: WORKLOAD.index("[images]")])
    with_images, without = (
        [(at, item.true_output) for at, item in open_trace(path)] for path in (workload, plain)
    )
    assert with_images == without


def test_a_file_and_its_card_keep_them(workload: Path, tmp_path: Path) -> None:
    made = open_trace(workload, limit=200)
    card = card_of(made)
    assert card.images is not None and card.num_with_images > 0
    assert "with images" in short(card)
    path = tmp_path / "shown.jsonl"
    write_trace(made, path)
    again = [item.parts for _, item in open_trace(path)]
    assert again == [item.parts for _, item in open_trace(workload, limit=200)]
    assert card_of(open_trace(path)).images == card.images
    plain = card_of(open_trace(Path("data") / "azure_2023_code_191.csv"))
    assert plain.images is None and "images" not in short(plain)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("share = 1.5", "share must be from 0 to 1"),
        ("[sessions]\nturns = 3\n[images]\nshare = 1", "images are of single calls"),
    ],
)
def test_mistakes_are_told(workload: Path, change: str, told: str) -> None:
    text = WORKLOAD.replace("share = 0.6", change)
    if "sessions" in change:
        text = WORKLOAD.replace("[images]\nshare = 0.6", change)
    workload.write_text(text)
    with pytest.raises(BadConfig, match=told):
        list(open_trace(workload))
