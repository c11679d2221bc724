"""What a diffusion language model cannot be asked is the caller's error, told before anything is queued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.core.canvas import MEANINGLESS, meaningless
from penstock.core.types import Grammar, Sampling
from penstock.gateway.ask import sampling_of
from penstock.gateway.bodies import CompletionBody
from penstock.gateway.errors import Unsupported, face
from penstock.gateway.text import TextModel

TINY = Path(__file__).parents[2] / "data" / "tiny_diffusion"
GIVEN: dict[str, Any] = {
    "min_tokens": 1,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {"3": 1.0},
}


@pytest.fixture(scope="module")
def text() -> TextModel:
    return TextModel.load(TINY)


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_a_field_without_meaning_is_refused_by_name(text: TextModel, name: str) -> None:
    body = CompletionBody(**{name: GIVEN[name]})
    with pytest.raises(Unsupported, match=f"{name} has no meaning") as found:
        sampling_of(body, text, None, as_model_prefers=True)
    assert found.value.param == name and face(found.value).status == 400


def test_every_name_is_one_of_sampling_and_is_found() -> None:
    odd = {"logprobs": 0, "prompt_logprobs": 0, "grammar": Grammar(kind="regex", text="a"), **GIVEN}
    assert set(odd) == set(MEANINGLESS)
    for name, value in odd.items():
        assert meaningless(replace(Sampling(), **{name: value})) == name
    assert meaningless(Sampling(temperature=0.3, seed=4, stop_ids=(3,), ignore_eos=True)) is None


def test_makers_wishes_without_meaning_are_passed_over(tmp_path: Path) -> None:
    """A published folder may prefer top_p: its callers never said so."""
    for path in TINY.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    wishes = {"do_sample": True, "temperature": 0.2, "top_p": 0.95, "top_k": 50}
    (tmp_path / "generation_config.json").write_text(json.dumps(wishes))
    chosen = sampling_of(CompletionBody(), TextModel.load(tmp_path), None, as_model_prefers=True)
    assert (chosen.temperature, chosen.top_p, chosen.top_k) == (0.2, 1.0, None)
