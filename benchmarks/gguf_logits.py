"""What becomes of a GGUF file's logits here, beside transformers' reader of the same file, which dequantises all of it.

    PYTHONPATH=. python benchmarks/gguf_logits.py FILE.gguf [--tokens 32] [--prompts 2]

    bytes      as it is served: rows are quantised to bytes on the way into a layer
    expanded   `executor.linear="plain"`: weights are numbers again, rows stay what they are
    ..., head  the same with transformers' head: a file's own head is often of six bits, which has eight here

All in fp32; prompts are random. An error of `expanded` with the other head would be one of reading.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from penstock.engine.folder import model_facts
from penstock.engine.torch.build import EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone, Decoder, StepInput
from penstock.engine.torch.ports import StepMeta

SIZE = 16


def opened(file: Path, linear: Literal["auto", "plain"], tokens: int) -> Decoder:
    config = EngineConfig(
        device="cpu",
        dtype="fp32",
        linear=linear,
        threads=1,
        num_blocks=-(-tokens // SIZE),
        packed_cache="off",
    )
    return build_decoder(model_facts(file), config, Alone(), None).decoder


def logits_of(decoder: Decoder, ids: Tensor, head: Tensor | None) -> Tensor:
    count = len(ids)
    meta = StepMeta(
        query_start=torch.tensor([0, count]).int(),
        context=torch.tensor([count]).int(),
        block_table=torch.arange(-(-count // SIZE)).int()[None],
        slots=torch.arange(count),
        max_query=count,
        max_context=count,
    )
    forward = decoder.forward(StepInput(ids, torch.arange(count), None, meta))
    while True:
        try:
            next(forward)
        except StopIteration as end:
            hidden: Tensor = end.value
            return decoder.logits(hidden) if head is None else hidden @ head.T


def compared(name: str, got: Tensor, wanted: Tensor) -> str:
    error = got[..., : wanted.shape[-1]] - wanted
    known = wanted.log_softmax(-1)
    lost = (known.exp() * (known - (wanted + error).log_softmax(-1))).sum(-1)
    other = (wanted + error).argmax(-1) != wanted.argmax(-1)
    first, second = wanted.topk(2, -1).values.unbind(-1)
    near = float((first - second)[other].max()) if other.any() else 0.0
    return (
        f"{name:15} error: greatest {error.abs().max():.4f}, rms {error.square().mean().sqrt():.5f}; "
        f"KL {lost.mean():.1e}; another likeliest token in {100 * other.float().mean():.1f} % of the rows, "
        f"where the two are at most {near:.4f} apart"
    )


def main() -> None:
    told = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    told.add_argument("file", type=Path)
    told.add_argument("--tokens", type=int, default=32)
    told.add_argument("--prompts", type=int, default=2)
    args = told.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, 4000, (args.tokens,), generator=draw) for _ in range(args.prompts)]
    model = AutoModelForCausalLM.from_pretrained(
        str(args.file.parent), gguf_file=args.file.name, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        wanted = torch.stack([model(ids[None]).logits[0] for ids in prompts])
        head = model.lm_head.weight
        print(f"logits spread by {wanted.std():.3f}")
        for linear, name in (("auto", "bytes"), ("plain", "expanded")):
            decoder = opened(args.file, linear, args.tokens)  # type: ignore[arg-type]
            for own, ending in ((None, ""), (head, ", head")):
                got = torch.stack([logits_of(decoder, ids, own) for ids in prompts])
                print(compared(name + ending, got, wanted), flush=True)


if __name__ == "__main__":
    main()
