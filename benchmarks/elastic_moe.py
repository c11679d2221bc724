"""More and fewer devices for the experts of a mixture under a steady stream, against starting anew.

    python -m benchmarks.elastic_moe [--requests 24] [--tokens 48]

A random mixture of 300 MB is served by a replica in a process of its own, its experts in two device processes. While
requests come at a steady pace the replica is told to use three, then two again. Compared are the answers with those of
a run that was left alone, the longest wait for a token with the usual step, the bytes copied with the least that any
placing of equal shares must move, and the memory (PSS of all processes of the replica, sampled) and the time with those
of the two ways to get there without it: ending the replica and starting it with three devices, or without devices from
packed weights that were kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from penstock.assemble import assemble, load_config, process_leaves
from penstock.cluster.fleets import Fleets
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling

HIDDEN, WIDTH, EXPERTS, LAYERS, VOCABULARY = 512, 512, 32, 6, 2048
SAMPLE_S = 0.02


def save_random_mixture(folder: Path) -> None:
    """A bf16 Qwen3-MoE folder; the weights do not matter to speed."""
    random = torch.Generator().manual_seed(0)

    def weight(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=random) * 0.05).bfloat16()

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN), "model.norm.weight": ones}
    tensors["lm_head.weight"] = weight(VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", HIDDEN // 2, HIDDEN),
            ("self_attn.v_proj", HIDDEN // 2, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate", EXPERTS, HIDDEN),
        ):
            tensors[f"{at}{name}.weight"] = weight(rows, columns)
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj"):
                tensors[f"{at}mlp.experts.{expert}.{name}.weight"] = weight(WIDTH, HIDDEN)
            tensors[f"{at}mlp.experts.{expert}.down_proj.weight"] = weight(HIDDEN, WIDTH)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = ones.clone()
        for name in ("q_norm", "k_norm"):
            tensors[f"{at}self_attn.{name}.weight"] = torch.ones(64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": HIDDEN,
        "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS,
        "num_experts_per_tok": 4, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def pss_bytes() -> int:
    """Of all processes below this one."""
    total = 0
    for child in psutil.Process().children(recursive=True):
        try:
            lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


@dataclass
class Watch:
    """The largest PSS seen."""

    most: int = 0
    task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            self.most = max(self.most, await asyncio.to_thread(pss_bytes))
            await asyncio.sleep(SAMPLE_S)

    def stop(self) -> int:
        assert self.task is not None
        self.task.cancel()
        return self.most


@dataclass
class Stream:
    """Requests at a steady pace: their tokens, and when each came."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=dict)
    failed: int = 0


async def start(folder: Path, devices: int | None, standby: int, cache: Path) -> Fleets:
    experts = "" if devices is None else f", expert_devices = {devices}, expert_standby = {standby}"
    text = f"""
[[fleet]]
model = "{folder}"
name = "m"
executor = {{kind = "torch", device = "cpu", dtype = "bf16", threads = 2, packed_cache = "{cache}"{experts}}}
cache = {{num_blocks = 512}}
"""
    path = folder / "fleet.toml"
    path.write_text(text)
    config = load_config(path)
    leaves, _ = process_leaves(config)
    return await assemble(config, leaves)


async def stream(service: Fleets, count: int, num_tokens: int, every_s: float) -> Stream:
    found = Stream()
    running = []
    for number in range(count):
        running.append(asyncio.create_task(_one(service, found, number, num_tokens)))
        await asyncio.sleep(every_s)
    await asyncio.gather(*running)
    return found


async def _one(service: Fleets, found: Stream, number: int, num_tokens: int) -> None:
    tokens, times = found.tokens.setdefault(number, []), found.times.setdefault(number, [])

    def hear(output: Output) -> None:
        tokens.extend(output.ids)
        times.append(time.perf_counter())

    request = Request(
        id=RequestId(f"r{number}-{time.perf_counter_ns()}"),
        model="m",
        prompt=TokenPrompt([(7 * number + 13 * at) % VOCABULARY for at in range(64)]),
        sampling=Sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True),
    )
    try:
        await service.submit(request, hear)
    except Exception:  # noqa: BLE001 - what is counted
        found.failed += 1


def gaps(found: Stream, since: float, until: float) -> tuple[float, float]:
    """(longest wait for a token around a span, the usual one outside it)"""
    inside, outside = [0.0], []
    for times in found.times.values():
        for before, after in zip(times, times[1:], strict=False):
            (inside if after >= since and before <= until else outside).append(after - before)
    return max(inside), statistics.median(outside)


async def changed(service: Fleets, devices: int, args: argparse.Namespace, want: Stream) -> float:
    """Seconds that the change took under a stream; the rest is printed."""
    await asyncio.sleep(args.settle)
    before = pss_bytes()
    watch = Watch()
    running = asyncio.create_task(stream(service, args.requests, args.tokens, args.every))
    await asyncio.sleep(args.requests * args.every / 3)
    watch.start()
    since = time.perf_counter()
    (shape,) = (await service.reshape("m", devices)).values()
    until = time.perf_counter()
    await asyncio.sleep(0.2)
    peak, found = watch.stop(), await running
    longest, usual = gaps(found, since, until)
    least = LAYERS * (EXPERTS // 3)
    print(
        f"{shape.was} -> {devices} devices: {until - since:.3f} s; failed {found.failed}; "
        f"answers as of a run left alone: {found.tokens == want.tokens}; "
        f"longest wait for a token {longest / usual:.1f} usual steps "
        f"({1000 * longest:.0f} of {1000 * usual:.0f} ms); copied {shape.num_copied} experts, read {shape.num_read}, "
        f"{shape.num_bytes / 1e6:.0f} MB (least {least} experts); PSS {before / 1e6:.0f} MB before, "
        f"{peak / 1e6:.0f} MB at most, {pss_bytes() / 1e6:.0f} MB behind"
    )
    return until - since


async def cold(folder: Path, devices: int | None, cache: Path) -> tuple[float, int]:
    """(seconds from nothing to the first answer, PSS then)"""
    watch = Watch()
    watch.start()
    since = time.perf_counter()
    service = await start(folder, devices, 0, cache)
    await stream(service, 1, 1, 0.0)
    took = time.perf_counter() - since
    peak = watch.stop()
    await service.stop()
    return took, peak


async def measure(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random_mixture(folder)
        cache = folder / "packed"
        service = await start(folder, 2, 1, cache)
        await stream(service, 2, 4, 0.0)
        want = await stream(service, args.requests, args.tokens, args.every)
        up_s = await changed(service, 3, args, want)
        down_s = await changed(service, 2, args, want)
        await service.stop()
        service = await start(folder, 2, 0, cache)
        await stream(service, 2, 4, 0.0)
        since = time.perf_counter()
        await service.reshape("m", 3)
        bare_s = time.perf_counter() - since
        await service.stop()
        await cold(folder, None, cache)
        await asyncio.sleep(args.settle)
        spread_s, spread_pss = await cold(folder, 3, cache)
        mapped_s, mapped_pss = await cold(folder, None, cache)
        print(f"without a standby: {bare_s:.2f} s")
        print(
            f"started anew with three devices: {spread_s:.2f} s, PSS at most {spread_pss / 1e6:.0f} MB"
        )
        print(
            f"started anew in one process, packed weights mapped: {mapped_s:.2f} s, PSS {mapped_pss / 1e6:.0f} MB"
        )
        fastest = min(spread_s, mapped_s)
        print(f"fastest start / change: up {fastest / up_s:.1f}, down {fastest / down_s:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--every", type=float, default=0.25, help="seconds between two requests")
    parser.add_argument("--settle", type=float, default=8.0, help="seconds for standbys to load")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
