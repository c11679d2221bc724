"""Penstock's own side of the lines, models of random weights, and the plain read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from penstock.core.errors import BadConfig
from penstock.engine.folder import model_facts
from penstock.lab.speed import models, side
from penstock.lab.speed.reading import Reader

ASK = {
    "model": "default",
    "weights": "bf16",
    "threads": 1,
    "requests": 2,
    "longest": 64,
    "tokens": 200,
}


async def lines(
    kind: str, question: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> list[dict[str, object]]:
    ours = side.Side(kind)
    side.say(await ours._answer({"do": "load", **ASK}))
    side.say(await ours._answer({"do": "generate", **question}))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


async def test_the_replica_tells_first_tokens_every_so_many_and_the_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    question = {"prompts": [[5, 6, 7], [8, 9]], "tokens": [20, 3], "every": 8}
    loaded, *marks, end = await lines("replica", question, capsys)
    assert "penstock" in str(loaded["about"]) and end == {"ok": True}
    of = [[mark["tokens"] for mark in marks if mark["request"] == at] for at in (0, 1)]
    assert of == [[1, 8, 16, 20], [1, 3]]


async def test_the_port_runs_one_request_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    question = {"prompts": [[5, 6, 7]], "tokens": [9], "every": 8}
    _, *marks, end = await lines("port", question, capsys)
    assert [mark["tokens"] for mark in marks] == [1, 8, 9] and end == {"ok": True}
    question = {"prompts": [[5], [6]], "tokens": [1, 1], "every": None}
    *_, end = await lines("port", question, capsys)
    assert "one request at a time" in str(end["error"])


def test_widths_that_the_engine_does_not_know_are_refused() -> None:
    with pytest.raises(BadConfig, match="weights cannot be int2"):
        side.engine_config(weights="int2")
    with pytest.raises(BadConfig, match="no 'warp'"):
        side.engine_config(warp=9)


def test_a_random_model_opens_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = models._model("tiny", "qwen3", (2, 32, 4, 2, 8, 48, 5000))
    monkeypatch.setitem(models.RANDOM_MODELS, "tiny", tiny)
    folder = models.model_folder("tiny", tmp_path)
    facts = model_facts(folder)
    assert (facts.num_layers, facts.vocab_size, facts.shape.hidden) == (2, 5000, 32)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == {name for name, _ in tiny.tensors()}
        table = file.get_tensor("model.embed_tokens.weight").float()
        assert tuple(table.shape) == (5000, 32)
        assert float(table.std()) == pytest.approx(0.02, rel=0.02)
        assert bool((file.get_tensor("model.norm.weight") == 1).all())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 5000
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.model_folder("tiny", tmp_path) == folder  # made once
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


async def test_a_plain_read_is_timed() -> None:
    found = Reader(2, 1 << 22).measure()
    assert found.threads == 2 and found.wall_bytes_s > 1e8
