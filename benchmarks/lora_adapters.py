"""What LoRA adapters add to a step: CPU seconds of a forward with them, as a ratio to the same forward without.

    python benchmarks/lora_adapters.py [--layers 4] [--rank 16] [--dtype bf16] [--rounds 15]

Four layers of Qwen3-0.6B's shape with random weights, one thread, adapters of all linear layers. Cases take turns, and
each counts with its lowest CPU seconds of all rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from penstock.engine.folder import model_facts
from penstock.engine.torch.adapters.bank import Factors
from penstock.engine.torch.adapters.store import AdapterStore
from penstock.engine.torch.build import Built, EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.step import StepArrays

CONTEXT, BLOCK = 512, 16
SHAPE = dict(
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=1024,
    max_position_embeddings=2048,
)


def fill(store: AdapterStore, slots: int, rank: int) -> None:
    """Random adapters of every place."""
    for slot in range(slots):
        for banks in store._places.banks:
            for bank in banks:
                factors = {
                    part.name: Factors(
                        down=torch.randn(rank, bank.width) * 0.01,
                        up=torch.randn(rank, part.width) * 0.01,
                    )
                    for part in bank.parts
                }
                bank.put(slot, factors)


def decodes(count: int, slots: tuple[int | None, ...]) -> StepArrays:
    """One token of each of `count` jobs, each with CONTEXT positions."""
    per = CONTEXT // BLOCK
    table = np.arange(count * per, dtype=np.int32).reshape(count, per)
    return StepArrays(
        ids=np.arange(count, dtype=np.int64),
        positions=np.full(count, CONTEXT - 1, np.int64),
        rows=np.arange(count),
        slots=table[:, -1].astype(np.int64) * BLOCK + BLOCK - 1,
        query_start=np.arange(count + 1, dtype=np.int32),
        context=np.full(count, CONTEXT, np.int32),
        block_table=table,
        max_query=1,
        max_context=CONTEXT,
        num_sampling=count,
        adapters=slots if any(slot is not None for slot in slots) else None,
    )


def prompt(slot: int | None) -> StepArrays:
    """CONTEXT tokens of one job."""
    at = np.arange(CONTEXT)
    return StepArrays(
        ids=at.astype(np.int64),
        positions=at.astype(np.int64),
        rows=at[-1:],
        slots=at.astype(np.int64),
        query_start=np.array([0, len(at)], np.int32),
        context=np.array([len(at)], np.int32),
        block_table=np.arange(len(at) // BLOCK, dtype=np.int32)[None],
        max_query=len(at),
        max_context=len(at),
        num_sampling=1,
        adapters=None if slot is None else (slot,),
    )


def seconds(built: Built, arrays: StepArrays) -> float:
    """CPU seconds of one forward, its arrays made from those of the step."""
    begin = time.process_time()
    for _ in built.decoder.forward(arrays.on(built.device)):
        pass
    return time.process_time() - begin


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__)
    told.add_argument("--layers", type=int, default=4)
    told.add_argument("--rank", type=int, default=16)
    told.add_argument("--dtype", default="bf16")
    told.add_argument("--rounds", type=int, default=15)
    args = told.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        config = Qwen3Config(num_hidden_layers=args.layers, **SHAPE)
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
        engine = EngineConfig(device="cpu", dtype=args.dtype, threads=1, num_blocks=1100)
        facts = model_facts(Path(place))
        bare = build_decoder(facts, engine, Alone(), None)
        with_room = build_decoder(facts, engine, Alone(), None)
    store = AdapterStore(
        with_room.decoder, slots=8, rank=args.rank, device=with_room.device, folders={}
    )
    print({name: note for name, note in with_room.notes.items() if name in ("dtype", "linear")})
    with torch.inference_mode():
        fill(store, 8, args.rank)
        measure(bare, with_room, args.rounds)


def measure(bare: Built, with_room: Built, rounds: int) -> None:
    plain = replace(bare, decoder=replace(bare.decoder, spaces=None))
    cases: list[tuple[str, list[tuple[str, Built, StepArrays]]]] = []
    for count in (1, 8, 32):
        none = decodes(count, (None,) * count)
        told = [("without", bare, none), ("room, unused", with_room, none)]
        told.append(("without, unrecorded", plain, none))
        for adapters in (1, 2, 8):
            if adapters <= count:
                slots = tuple(at % adapters for at in range(count))
                told.append((f"{adapters} adapters", with_room, decodes(count, slots)))
        if count > 1:
            half = tuple(at % 8 if at % 2 else None for at in range(count))
            told.append(("every other row", with_room, decodes(count, half)))
        cases.append((f"decode of {count}", told))
    whole = [("without", bare, prompt(None)), ("room, unused", with_room, prompt(None))]
    cases.append(("prompt of 512", [*whole, ("1 adapter", with_room, prompt(3))]))
    for name, told in cases:
        best = [float("inf")] * len(told)
        for _ in range(rounds):
            for at, (_, built, arrays) in enumerate(told):
                best[at] = min(best[at], seconds(built, arrays))
        print(f"{name}: without {1e3 * best[0]:.2f} CPU ms; as a ratio to it:")
        for (what, *_), lowest in zip(told[1:], best[1:], strict=True):
            print(f"    {what:20} {lowest / best[0]:.3f}")


if __name__ == "__main__":
    main()
