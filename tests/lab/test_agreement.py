"""Agreement of a trained model with its exact run: what must be 1 is 1, and what is told is counted as said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from penstock.core.errors import BadConfig, BadModel
from penstock.core.types import CanvasRule
from penstock.engine.torch.build import EngineConfig
from penstock.lab.agreement import agreement, equal_share, exact, is_exact, named, settings, text_of

TINY = Path(__file__).parents[2] / "data" / "tiny_diffusion"
CONFIG = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=128)
USUAL = CanvasRule()


def some(tmp_path: Path, num: int) -> Path:
    lines = (TINY / "held_out.jsonl").read_text().splitlines()
    picked = [line for line in lines if json.loads(line)["kind"] == "pages"][:num]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(picked) + "\n")
    return path


def test_settings_begin_with_the_exact_one() -> None:
    found = settings(USUAL, [1.0, 0.5], [4, 1], [0.9])
    assert is_exact(found[0]) and found[0] == exact(USUAL)
    assert [named(rule) for rule in found[1:]] == [
        "retention 1, once a block",
        "retention 0.5, once a block",
        "retention 1, every 4",
        "retention 0.5, every 4",
        "retention 1, every 1",
        "retention 0.5, every 1",
        "retention 1, once a block, over 0.9",
        "retention 0.5, once a block, over 0.9",
    ]
    assert {exact(USUAL).phase(step) for step in range(32)} == {"full"}


def test_exact_settings_agree_wholly_and_a_quarter_does_not(tmp_path: Path) -> None:
    """A block of 16 in 8 steps."""
    usual = CanvasRule(block_tokens=16, steps=8)
    rules = [*settings(usual, [1.0, 0.25], []), replace(usual, refresh_every=1)]
    rules.append(replace(usual, retention=1.0, threshold=0.02))
    found = agreement(
        str(TINY), prompts=some(tmp_path, 3), rules=rules, num_masks=32, config=CONFIG
    )
    by_name = {named(one.rule): one for one in found}
    first = by_name["exact (every step whole)"]
    always = by_name["retention 0.5, every 1"]
    kept, quarter = by_name["retention 1, once a block"], by_name["retention 0.25, once a block"]
    assert (always.same, always.whole) == (first.same, first.whole) == (1.0, 1.0)
    assert kept.dense == 1.0 and quarter.dense is not None and quarter.dense < 1.0
    assert quarter.same < 1.0 and quarter.right is not None
    for one in (first, kept, quarter):  # guessed by a model that has learned something
        assert one.infilled is not None and 0.3 < one.infilled < 1.0
    parallel = by_name["retention 1, once a block, over 0.02"]
    assert parallel.computed < kept.computed  # fewer steps
    assert always.infilled == first.infilled
    assert first.computed > kept.computed == quarter.computed
    assert first.computed == pytest.approx(always.computed)
    assert quarter.kept <= kept.kept // 4 + 1
    told = text_of(found)
    assert "pages: 3 prompts" in told and "retention 0.25, once a block" in told


def test_shares_are_of_positions_that_both_have() -> None:
    assert equal_share([(1, 2, 3), (4,)], [(1, 5), (4, 9)]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[]", "not an object"),
        ('{"answer": "x"}', "not an object"),
        ('{"prompt": "' + "word " * 600 + '"}', "does not fit a context of 512"),
        ("", "holds no prompts"),
    ],
)
def test_odd_prompts_are_refused_with_their_line(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(line)
    with pytest.raises(BadConfig, match=told):
        agreement(str(TINY), prompts=path, rules=[exact(USUAL)], config=CONFIG)


def test_a_model_that_writes_from_left_to_right_has_nothing_to_compare(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModel, match="writes from left to right"):
        agreement(str(tmp_path), prompts=None, rules=[exact(USUAL)], config=CONFIG)
    with pytest.raises(BadConfig, match="does not exist"):
        agreement(str(TINY), prompts=tmp_path / "none", rules=[exact(USUAL)], config=CONFIG)
