# ruff: noqa: E402
"""The official client against `penstock serve` with a small random encoder, and against transformers."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
from openai import BadRequestError, OpenAI

pytest.importorskip("torch")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.engine.torch.encoders import package, saved_encoder, states_of
from tests.serve.test_serve import serving

TEXTS = ["w1 w2 w3", " ".join(f"w{at}" for at in range(150)), "w9"]


@pytest.mark.slow
def test_an_encoder_served(tmp_path: Path) -> None:
    folder, model = saved_encoder(tmp_path, "bert")
    package(folder, ["mean_tokens"])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{at}" for at in range(508))]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    with serving(str(folder), "--dtype", "fp32") as running:
        client = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)
        told = client.embeddings.create(model="bert", input=TEXTS)
        for text, one in zip(TEXTS, told.data, strict=True):
            want = states_of(model, tokenizer.encode(text).ids).mean(0)
            got = torch.tensor(np.array(one.embedding, np.float32))
            assert (got - want / want.norm()).abs().max() < 1e-5
        with pytest.raises(BadRequestError, match="writes no text"):
            client.completions.create(model="bert", prompt="w1")
        with pytest.raises(BadRequestError, match="at most 200 tokens"):
            client.embeddings.create(model="bert", input="w1 " * 300)
        metrics = httpx.get(f"{running.url}/metrics").text
        assert (
            'penstock:request_success_total{finished_reason="stop",model_name="bert"} 3.0'
            in metrics
        )
        client.close()
