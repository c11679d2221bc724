"""Decode and prefill speed of the engine beside transformers' generate, same random model, same run.

    python benchmarks/engine_vs_transformers.py [--batches 1,8,32] [--threads 1] [--dtype bf16] [--json FILE]

The model is a Llama of 12 layers x 768 (12 query and 4 key/value heads, MLP 2560, vocabulary 32000). For each batch
size both sides get the same prompts; prefill is the time to the first token of all, decode the time of the tokens
after it. The engine is driven through its port as a replica drives it (steps of at most `--chunk` tokens), greedy on
both sides. Sides alternate, `--repeat` times, and the best of each is taken (other processes only ever make it
worse); processor seconds are of that run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from random_models import save_random_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from penstock.core.plans import Done, Opening, Plan, Work
from penstock.core.prompt import TokenPrompt
from penstock.core.types import PlanId, Request, RequestId, Sampling
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.torch.ports import DTYPES

SHAPE = dict(
    hidden_size=768,
    intermediate_size=2560,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=32000,
)


class Speed(NamedTuple):
    """Tokens a second, wall and processor."""

    prefill: float
    decode: float
    prefill_cpu_s: float
    decode_cpu_s: float


class Clock:
    """Wall and processor seconds since the last look."""

    def __init__(self) -> None:
        self.look()

    def look(self) -> tuple[float, float]:
        now = time.perf_counter(), sum(os.times()[:2])
        spent = (now[0] - self._at[0], now[1] - self._at[1]) if hasattr(self, "_at") else (0.0, 0.0)
        self._at = now
        return spent


class Engine:
    """The executor, driven plan by plan."""

    def __init__(self, executor: TorchExecutor) -> None:
        self.executor = executor
        self._heard: asyncio.Queue[Done] = asyncio.Queue()
        self._plans = self._seqs = 0
        executor.listen(self._heard.put_nowait)  # type: ignore[arg-type]

    async def run(self, prompts: list[list[int]], num_tokens: int, chunk: int) -> Speed:
        size, first = self.executor.block_size, self._seqs
        each = -(-(len(prompts[0]) + num_tokens) // size)
        self._seqs += len(prompts)
        opened = {
            first + at: Opening(first + at, _request(first + at, ids), 0)
            for at, ids in enumerate(prompts)
        }
        clock = Clock()
        for works in _prefill(first, prompts, each, chunk):
            await self._step(works, tuple(opened[work.seq] for work in works if not work.start))
        prefill = clock.look()
        for step in range(num_tokens - 1):
            place = len(prompts[0]) + step
            await self._step(tuple(Work(seq, place, 1, True) for seq in opened))
        decode = clock.look()
        self.executor.close_jobs(list(opened))
        return speed(prompts, num_tokens, prefill, decode)

    async def _step(self, work: tuple[Work, ...], opened: tuple[Opening, ...] = ()) -> None:
        self._plans += 1
        self.executor.launch(Plan(id=PlanId(self._plans), work=work, opened=opened))
        done = await self._heard.get()
        assert done.error is None, done.error


def _prefill(
    first: int, prompts: list[list[int]], each: int, chunk: int
) -> Iterator[tuple[Work, ...]]:
    """Steps of at most `chunk` tokens; job n has the blocks from n * each on."""
    step: list[Work] = []
    for at, ids in enumerate(prompts):
        blocks, start = tuple(range(at * each, (at + 1) * each)), 0
        while start < len(ids):
            count = min(chunk - sum(work.tokens for work in step), len(ids) - start)
            is_last = start + count == len(ids)
            step.append(Work(first + at, start, count, is_last, () if start else blocks, not start))
            start += count
            if sum(work.tokens for work in step) == chunk:
                yield tuple(step)
                step = []
    if step:
        yield tuple(step)


def _request(seq: int, ids: list[int]) -> Request:
    sampling = Sampling(temperature=0.0, ignore_eos=True, max_tokens=4096)
    return Request(id=RequestId(str(seq)), model="m", prompt=TokenPrompt(ids), sampling=sampling)


class FirstToken(StoppingCriteria):
    """Looks at the clock when generate has its first token; never stops it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.spent: tuple[float, float] | None = None

    def __call__(self, ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        if self.spent is None:
            self.spent = self._clock.look()
        return torch.zeros(len(ids), dtype=torch.bool)


def reference(model, prompts: list[list[int]], num_tokens: int) -> Speed:  # type: ignore[no-untyped-def]
    """transformers' generate, its first token apart."""
    ids = torch.tensor(prompts)
    clock = Clock()
    first = FirstToken(clock)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([first]),
    )
    assert first.spent is not None
    return speed(prompts, num_tokens, first.spent, clock.look())


def speed(
    prompts: list[list[int]],
    num_tokens: int,
    prefill: tuple[float, float],
    decode: tuple[float, float],
) -> Speed:
    return Speed(
        prefill=len(prompts) * len(prompts[0]) / prefill[0],
        decode=len(prompts) * (num_tokens - 1) / decode[0],
        prefill_cpu_s=prefill[1],
        decode_cpu_s=decode[1],
    )


def best(runs: list[Speed]) -> Speed:
    """Each figure from the fastest run of its kind."""
    by_prefill = max(runs, key=lambda run: run.prefill)
    by_decode = max(runs, key=lambda run: run.decode)
    return Speed(
        by_prefill.prefill, by_decode.decode, by_prefill.prefill_cpu_s, by_decode.decode_cpu_s
    )


async def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    config = EngineConfig(device="cpu", dtype=args.dtype, threads=args.threads, num_blocks=2048)
    executor = open_executor(str(folder), config)
    engine = Engine(executor)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype]).eval()
    print(f"{executor.notes}; torch {torch.__version__}, {args.threads} threads", flush=True)
    found: list[dict[str, object]] = []
    for batch in map(int, args.batches.split(",")):
        prompts = [
            [(31 * at + 7 * n) % 31000 + 1 for n in range(args.prompt)] for at in range(batch)
        ]
        ours, theirs = [], []
        for _ in range(args.repeat):
            ours.append(await engine.run(prompts, args.tokens, args.chunk))
            theirs.append(reference(model, prompts, args.tokens))
        found.append(
            {"batch": batch, "engine": best(ours)._asdict(), "transformers": best(theirs)._asdict()}
        )
        show(found[-1])
    await executor.stop()
    return found


def show(row: dict[str, object]) -> None:
    ours, theirs = row["engine"], row["transformers"]
    assert isinstance(ours, dict) and isinstance(theirs, dict)
    for what in ("prefill", "decode"):
        ratio = ours[what] / theirs[what]
        cpu = theirs[f"{what}_cpu_s"] / ours[f"{what}_cpu_s"]
        print(
            f"{row['batch']:>6} {what:>8} {ours[what]:10.1f} {theirs[what]:13.1f} {ratio:7.2f}"
            f" {ours[f'{what}_cpu_s']:10.2f} {theirs[f'{what}_cpu_s']:13.2f} {cpu:7.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as root, torch.inference_mode():
        params = save_random_llama(Path(root), SHAPE)
        print(f"{params / 1e6:.1f} M parameters, prompts of {args.prompt}, {args.tokens} tokens")
        print("                     tokens / s                         processor seconds")
        print(" batch     what     engine  transformers   ratio     engine  transformers   ratio")
        found = asyncio.run(measure(args, Path(root)))
    if args.json:
        told = {"params": params, **vars(args), "json": str(args.json), "rows": found}
        args.json.write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
