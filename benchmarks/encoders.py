"""What an encoder's vectors cost, beside transformers on the same texts: CPU seconds of one thread, in turns.

    python benchmarks/encoders.py [--texts 256] [--rounds 5]

A random model of the sizes of all-MiniLM-L6-v2, texts of log-normal lengths (median 24 tokens, 3 to 256), mean pooling.
transformers is given what sentence-transformers gives it: texts sorted by length, 32 at a time, padded to the longest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

from penstock.engine.folder import model_facts
from penstock.engine.torch.build import EngineConfig
from penstock.engine.torch.encoders.model import Encoder, Text
from penstock.engine.torch.encoders.open import open_encoder


def made() -> tuple[BertModel, Encoder]:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = EngineConfig(device="cpu", dtype="fp32", threads=1)
        return model, open_encoder(model_facts(Path(folder)), engine)._model


def theirs(model: BertModel, texts: list[list[int]]) -> torch.Tensor:
    order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
    found = torch.empty(len(texts), 384)
    for start in range(0, len(order), 32):
        some = order[start : start + 32]
        longest = max(len(texts[at]) for at in some)
        ids = torch.tensor([texts[at] + [0] * (longest - len(texts[at])) for at in some])
        mask = (ids != 0).long()
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        found[some] = states.sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(found, dim=-1)


def ours(model: Encoder, texts: list[list[int]]) -> torch.Tensor:
    running = model.vectors([Text(ids) for ids in texts])
    while True:
        try:
            next(running)
        except StopIteration as end:
            rows = [np.frombuffer(vector, "<f4") for vector in end.value]
            return torch.from_numpy(np.stack(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    told = parser.parse_args()
    torch.set_num_threads(1)
    chance = np.random.default_rng(0)
    lengths = np.clip(chance.lognormal(np.log(24), 0.8, told.texts), 3, 256).astype(int)
    texts = [chance.integers(1, 30000, length).tolist() for length in lengths]
    model, encoder = made()
    ratios, spent = [], []
    with torch.inference_mode():
        worst = float((ours(encoder, texts) - theirs(model, texts)).abs().max())
        for _ in range(told.rounds):
            began = time.process_time()
            theirs(model, texts)
            middle = time.process_time()
            ours(encoder, texts)
            spent.append(time.process_time() - middle)
            ratios.append((middle - began) / spent[-1])
    print(f"{lengths.sum()} tokens in {told.texts} texts; largest difference {worst:.1e}")
    print(f"penstock: {lengths.sum() / statistics.median(spent):.0f} tokens a CPU second")
    low, high = min(ratios), max(ratios)
    print(
        f"transformers takes {statistics.median(ratios):.2f} times the CPU time ({low:.2f} to {high:.2f})"
    )


if __name__ == "__main__":
    main()
