"""KV transfers by hand."""

from __future__ import annotations

import pytest

from penstock.core.errors import BadConfig
from penstock.cost.links import link_of, read_links
from penstock.cost.shapes import shape_of


def test_a_prompt_of_an_8b_model_over_roce() -> None:
    """128 KiB a token: 8,192 tokens are 1.07 GB, 54 ms at 20 GB/s; two devices send half each."""
    link, llama = link_of("roce-200"), shape_of("llama-3.1-8b")
    assert link.kv_seconds(llama, 8192) == pytest.approx(0.0005 + 8192 * 131072 / 20e9)
    assert link.kv_seconds(llama, 8192, tp=2) == pytest.approx(0.0005 + 8192 * 131072 / 40e9)
    assert link.seconds(0.0, is_slow=True) == 0.002


def test_links_are_plausible() -> None:
    assert len(read_links()) >= 4
    for link in read_links().values():
        assert 0 < link.setup_s[0] < link.setup_s[1] < 0.1 and link.gb_s > 1 and link.source
    with pytest.raises(BadConfig, match="no link is named 'string'"):
        link_of("string")
