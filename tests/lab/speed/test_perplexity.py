"""Perplexity as the engine serves it, beside transformers' own model and the definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from penstock.__main__ import run as penstock
from penstock.engine.folder import DEFAULT_FOLDER
from penstock.lab.speed.perplexity import measure, windows_of

TEXT = Path(json.__file__).read_text()


def test_every_token_is_counted_once_with_half_a_window_before_it() -> None:
    for length, context in ((2, 16), (16, 16), (17, 16), (100, 16), (101, 10)):
        counted = []
        for ids, first in windows_of(range(length), context):
            assert len(ids) <= context and first >= 1
            assert list(ids) == list(range(ids[0], ids[-1] + 1))
            assert ids[0] == 0 or first >= context - context // 2
            counted += ids[first:]
        assert counted == list(range(1, length))


def nats_of(ids: list[int], context: int) -> float:
    """The definition, a window at a time, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_FOLDER, dtype=torch.float32).eval()
    total, done = 0.0, 1
    with torch.inference_mode():
        while done < len(ids):
            end = min(len(ids), context if done == 1 else done + context // 2)
            begin = max(0, end - context)
            logits = model(torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
            total -= sum(float(logits[at - begin - 1, ids[at]]) for at in range(done, end))
            done = end
    return total


def test_it_is_what_transformers_computes() -> None:
    ids = Tokenizer.from_file(str(DEFAULT_FOLDER / "tokenizer.json")).encode(TEXT).ids[:400]
    (found,) = measure("default", [TEXT], [("bf16", "auto")], context=128, limit=400)
    assert found.num_tokens == 399 and found.more == 0.0
    assert math.log(found.perplexity) == pytest.approx(nats_of(ids, 128) / 399, rel=0.01)
    decoded = Tokenizer.from_file(str(DEFAULT_FOLDER / "tokenizer.json")).decode(ids[1:])
    bits = math.log2(found.perplexity) * 399 / len(decoded.encode())
    assert found.bits_per_byte == pytest.approx(bits)


def test_the_verb_reads_texts_and_refuses_what_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT[:800])
    asked = ["bench", "quality", "default", "--weights", "bf16", "--context", "64"]
    assert penstock([*asked, "--text", str(file), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["perplexity"] > 1 and told["is_met"] is None
    assert penstock([*asked, "--text", str(tmp_path / "none.txt")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert penstock(["bench", "quality", str(tmp_path), "--weights", "int3"]) == 2
    assert "there is no 'int3'" in capsys.readouterr().err
    assert penstock(["bench", "quality", str(tmp_path), "--weights", "bf16"]) == 2
    assert "give --text" in capsys.readouterr().err
