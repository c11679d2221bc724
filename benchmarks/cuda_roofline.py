"""Decoding and prefill on a CUDA card against what the card itself reads and multiplies, measured in the same run.

    PYTHONPATH=. python benchmarks/cuda_roofline.py --model 0.6b --weights bf16 --out result.json

The model has the published shape of Qwen3 0.6B or 8B, or 12 of the 48 layers of 30B-A3B ("moe"), and random weights
made on the card: they do not matter to speed, but that a router of random weights takes experts evenly.

    card      bytes/s of summing 4 GiB and of copying them (read and written both counted), the larger counts;
              multiplications of two 8192 x 8192 matrices in bf16
    decode    a step of B jobs with a context each. Of the roof: bytes of all weights that a step multiplies with and
              of the keys and values it reads, by bytes/s, by time. `played`: the recorded step alone on the card;
              `step`: from launch to completion of a plan through the executor's port, host included
    prefill   one prompt, through the port. Of the roof: operations of all products and of causal attention, by the
              card's own, by time

Every figure is the median of --repeats, with the range of them. `--calibrate FILE` writes a profile for the
simulator instead, of prompts in chunks of up to 2,048 tokens and of decoding by up to 128 jobs, as
`penstock bench calibrate` does of models with weights.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from penstock.engine.torch import build
from penstock.engine.torch.build import EngineConfig
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import open_executor
from penstock.engine.torch.weights import WeightFolder
from penstock.lab.measure import StepMeter

SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                 num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False),
    "moe": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=12, num_attention_heads=32,
                num_key_value_heads=4, head_dim=128, vocab_size=151936, tie_word_embeddings=False,
                num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True),
}  # fmt: skip
CONTEXT = 16384


class RandomWeights(WeightFolder):
    """Tensors of whatever shape is asked for, made on the device."""

    def __init__(  # noqa: PLR0913 - as its parent
        self, folder: Path, dtype: torch.dtype, device: torch.device, *, rank: int = 0, world: int = 1
    ) -> None:  # fmt: skip
        self.folder, self.dtype, self.device = folder, dtype, device
        self.rank, self.world, self.prefix, self.gave_codes = rank, world, "model.", False
        self._random = torch.Generator(device).manual_seed(0)

    def __contains__(self, name: str) -> bool:
        return not name.endswith("bias")

    def value(self, name: str, shape: Any, *parts: Any, **more: Any) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(tuple(shape), dtype=self.dtype, device=self.device)
        made = torch.randn(
            tuple(shape), generator=self._random, device=self.device, dtype=self.dtype
        )
        return made.mul_(0.02)

    def is_quantised(self, name: str) -> bool:
        return False

    def check_layers(self, count: int) -> None: ...

    def unread(self) -> list[str]:
        return []

    def said(self) -> str | None:
        return None

    def close(self) -> None: ...


def opened(name: str, weights: str, graphs: str = "auto", graph_batch: int = 128) -> TorchExecutor:
    folder = Path(tempfile.mkdtemp(prefix="penstock-shape-"))
    is_mixed = "num_experts" in SHAPES[name]
    kind = ("Qwen3MoeForCausalLM", "qwen3_moe") if is_mixed else ("Qwen3ForCausalLM", "qwen3")
    config = {"architectures": [kind[0]], "model_type": kind[1], "hidden_act": "silu",
              "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
              "attention_bias": False, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16",
              **SHAPES[name]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    build.WeightFolder = RandomWeights  # type: ignore[misc]
    how: Any = "stored" if weights == "bf16" else weights
    return open_executor(
        str(folder),
        EngineConfig(device="cuda", dtype="bf16", weights=how, num_blocks=12000, max_context=CONTEXT,
                     graphs=graphs, graph_batch=graph_batch),  # type: ignore[arg-type]
    )  # fmt: skip


def timed(run: Callable[[], object], times: int, repeats: int) -> list[float]:
    """Seconds of one run, by events around `times` of them, `repeats` times."""
    for _ in range(2):
        run()
    found = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / times)
    return found


def of_card(repeats: int) -> dict[str, Any]:
    read, copy = _bytes(repeats)
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    flops = [2 * 8192**3 / t for t in timed(lambda: a @ b, 5, repeats)]
    return {
        "card": torch.cuda.get_device_name(),
        "read": spread(read),
        "copy": spread(copy),
        "flops": spread(flops),
        "bytes_per_s": max(statistics.median(read), statistics.median(copy)),
    }


def _bytes(repeats: int) -> tuple[list[float], list[float]]:
    many = torch.randn(1 << 30, device="cuda")
    other = torch.empty_like(many)
    read = [many.nbytes / t for t in timed(lambda: many.sum(), 3, repeats)]
    return read, [2 * many.nbytes / t for t in timed(lambda: other.copy_(many), 3, repeats)]


def spread(values: list[float]) -> list[float]:
    """median, least, most"""
    return [statistics.median(values), min(values), max(values)]


def weight_bytes(executor: TorchExecutor, batch: int = 1) -> int:
    """Of all products of a step: everything the layers hold, and the head; of experts, as many as `batch` jobs take."""
    experts = executor.facts.shape.experts
    if experts is not None:
        return _mixed_bytes(executor, batch, experts.count, experts.top_k)
    decoder, seen, total = executor._decoder, set(), 0

    def count(thing: Any) -> None:
        nonlocal total
        for name in getattr(thing, "__dataclass_fields__", ()):
            value = getattr(thing, name)
            if isinstance(value, torch.Tensor):
                if value.data_ptr() not in seen and value.dim() == 2 and name != "table":
                    seen.add(value.data_ptr())
                    total += value.nbytes
            elif hasattr(value, "__dataclass_fields__"):
                count(value)

    for layer in decoder.layers:
        count(layer.attention)
        count(layer.mlp)
    count(decoder.head)
    return total


def _mixed_bytes(executor: TorchExecutor, batch: int, count: int, top_k: int) -> int:
    """With experts taken evenly, count * (1 - (1 - top_k / count)^batch) of them are."""
    shape, decoder = executor.facts.shape, executor._decoder
    assert shape.experts is not None
    taken = count * (1 - (1 - top_k / count) ** batch)
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * shape.hidden
    each = heads + count * shape.hidden + 3 * shape.hidden * shape.experts.width * taken
    return int(2 * (each * len(decoder.layers) + shape.vocab_size * shape.hidden))


async def decode(
    executor: TorchExecutor, batch: int, context: int, card: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """See the module's text."""
    meter = StepMeter(executor, executor.facts.vocab_size)
    jobs = meter._jobs(batch, context)
    for at in range(0, batch, 8):
        some = jobs[at : at + 8]
        await meter._step([(job, context) for job in some])
    steps = []
    for _ in range(3 + 8):
        jobs_here = [(job, 1) for job in jobs]
        steps.append((await meter._step(jobs_here)).seconds)
    shape = executor.facts.shape
    kv = 2 * shape.num_kv_heads * shape.head_dim * 2 * shape.num_layers * (context + 8) * batch
    roof = (weight_bytes(executor, batch) + kv) / card["bytes_per_s"]
    found: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "roof_s": roof,
        "step_s": spread(steps[3:]),
    }
    found["step_of_roof"] = roof / found["step_s"][0]
    if executor._graphs is not None and batch <= executor._graphs._sizes[-1]:
        slot = executor._graphs._slots[next(s for s in executor._graphs._sizes if s >= batch)]
        with torch.inference_mode():
            played = timed(slot.play, 20, repeats)
        found["played_s"] = spread(played)
        found["played_of_roof"] = roof / found["played_s"][0]
    executor.close_jobs([job.seq for job in jobs])
    return found


async def prefill(
    executor: TorchExecutor, tokens: int, card: dict[str, Any], repeats: int
) -> dict[str, Any]:
    meter = StepMeter(executor, executor.facts.vocab_size)
    shape, times = executor.facts.shape, []
    for _ in range(2 + repeats):
        (job,) = meter._jobs(1, tokens)
        times.append((await meter._step([(job, tokens)])).seconds)
        executor.close_jobs([job.seq])
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * shape.hidden
    wide = shape.intermediate
    if shape.experts is not None:
        wide = shape.experts.top_k * shape.experts.width
    each = heads + shape.num_heads * shape.head_dim * shape.hidden + 3 * shape.hidden * wide
    flops = 2 * each * shape.num_layers * tokens + 2 * shape.vocab_size * shape.hidden
    flops += 2 * tokens * (tokens + 1) * shape.num_heads * shape.head_dim * shape.num_layers
    found: dict[str, Any] = {"tokens": tokens, "flops": flops, "step_s": spread(times[2:])}
    found["of_peak"] = flops / found["step_s"][0] / card["flops"][0]
    return found


async def profile(executor: TorchExecutor, kind: str, size: int) -> list[list[Any]]:
    """The kernels of one decode step at a batch, or of one prompt: [name, calls, microseconds]."""
    meter = StepMeter(executor, executor.facts.vocab_size)
    if kind == "decode":
        jobs = meter._jobs(size, 512)
        for job in jobs:
            await meter._step([(job, 512)])
        pieces = [(job, 1) for job in jobs]
        await meter._step(pieces)
    else:
        jobs = meter._jobs(1, size)
        pieces = [(jobs[0], size)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watch:
        await meter._step(pieces)
        torch.cuda.synchronize()
    executor.close_jobs([job.seq for job in jobs])
    rows = sorted(watch.key_averages(), key=lambda row: -row.device_time_total)
    return [[row.key[:70], row.count, round(row.device_time_total, 1)] for row in rows[:16]]


async def measured(args: argparse.Namespace, card: dict[str, Any]) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    executor = opened(args.model, args.weights, args.graphs, max(args.batches))
    found: dict[str, Any] = {
        "model": args.model,
        "weights": args.weights,
        "notes": executor.notes,
        "weight_bytes": weight_bytes(executor),
        "decode": [
            await decode(executor, b, args.context, card, args.repeats) for b in args.batches
        ],
        "prefill": [await prefill(executor, n, card, args.repeats) for n in args.prompts],
    }
    if args.profile:
        found["profile"] = {
            "decode 1": await profile(executor, "decode", 1),
            "decode 32": await profile(executor, "decode", 32),
            f"prefill {args.profiled}": await profile(executor, "prefill", args.profiled),
        }
    await executor.stop()
    return found


def calibrate(args: argparse.Namespace) -> None:
    """Steps alone, without a scheduler and HTTP."""
    from penstock.cost.profile import describe_machine
    from penstock.lab.calibrate import Engine, _device_of, _written
    from penstock.lab.measure import Grid, MeasuredStep, measure_steps

    executor = opened(args.model, args.weights)
    grid = Grid(
        batches=(1, 2, 4, 8, 16, 32, 64, 128), contexts=(64, 512, 2048), chunks=(128, 512, 2048), rounds=2
    )  # fmt: skip

    async def steps() -> list[MeasuredStep]:
        try:
            return await measure_steps(executor, executor.facts.vocab_size, grid)
        finally:
            await executor.stop()

    measured = asyncio.run(steps())
    engine = Engine(model=f"Qwen3-{args.model}", device="cuda", dtype="bf16", weights=args.weights)
    device = f"{torch.cuda.get_device_name()}, {_device_of(executor.notes, engine)}"
    machine, layers = describe_machine({"device": device}), executor.facts.num_layers
    print(_written(measured, engine, machine, layers, None, None, args.calibrate))


def told(found: dict[str, Any]) -> str:
    """A table, a line a figure."""
    lines = [f"{found['model']} {found['weights']}: {found['weight_bytes'] / 1e9:.2f} GB a step"]
    for row in found["decode"]:
        line = f"  decode {row['batch']:4} x {row['context']}: step {_us(row['step_s'])}, "
        line += f"{row['step_of_roof']:.0%} of the roof"
        if "played_s" in row:
            line += f"; played {_us(row['played_s'])}, {row['played_of_roof']:.0%}"
        lines.append(line)
    for row in found["prefill"]:
        lines.append(
            f"  prefill {row['tokens']:5}: {_us(row['step_s'])}, {row['of_peak']:.0%} of the card's own product"
        )
    for name, rows in found.get("profile", {}).items():
        lines.append(f"  {name}")
        lines += [f"    {time:9.1f} us {count:5} x {key}" for key, count, time in rows]
    return "\n".join(lines)


def _us(values: list[float]) -> str:
    return f"{values[0] * 1e6:.0f} us ({values[1] * 1e6:.0f} to {values[2] * 1e6:.0f})"


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    words.add_argument("--model", choices=SHAPES, default="0.6b")
    words.add_argument("--weights", choices=["bf16", "int8", "int4"], default="bf16")
    words.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    words.add_argument("--prompts", type=int, nargs="*", default=[512, 2048, 8192])
    words.add_argument("--context", type=int, default=512)
    words.add_argument("--graphs", choices=["auto", "off"], default="auto")
    words.add_argument("--repeats", type=int, default=5)
    words.add_argument("--profile", action="store_true", help="also the kernels that take longest")
    words.add_argument("--profiled", type=int, default=8192, metavar="TOKENS", help="of a prompt")
    words.add_argument("--out", type=Path)
    words.add_argument("--calibrate", type=Path, metavar="FILE")
    args = words.parse_args()
    if args.calibrate:
        calibrate(args)
        return
    card = of_card(args.repeats)
    print(
        f"{card['card']}: reads {card['read'][0] / 1e12:.2f} TB/s, copies {card['copy'][0] / 1e12:.2f} TB/s, "
        f"multiplies {card['flops'][0] / 1e12:.0f} TFLOP/s in bf16",
        flush=True,
    )
    found = asyncio.run(measured(args, card))
    print(told(found), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"card": card, **found}, indent=1))


if __name__ == "__main__":
    main()
