"""What a diffusion language model takes at its peak, as the operating system counts it: logits, and keys that are kept.

    python -m benchmarks.canvas_memory [--positions 512] [--answers 8] [--kept-answers 32] [--vocab 32000] [--json FILE]

Each line is a process of its own, forked when the model is loaded and has run: resident memory at its peak (VmHWM,
reset first) less what it had before; the C library is told to give back what is freed. `answers` canvases of
`positions` go through the engine's own code, random weights in fp32:

    sampler    one full step's hidden rows turned into (token, confidence): all rows at once as LLaDA's published code
               does it (Gumbel noise and softmax in fp64), as one slice of ours, and ours for the masked rows of active
               blocks in slices of 1024, 128 and 32 rows
    step       a whole full step of the model, with those slices
    kept       an arena, a refresh of every answer one by one, then one reuse step of all, for several retentions

`counted` is what the sizes say: rows x words x bytes a logit, and positions kept x bytes of a position's keys and
values. Logits are fp32 here: the published sampler holds them beside two buffers in fp64 (20 bytes; 18 where they are
bf16), ours beside what the log-sum-exp takes (8 bytes; 10 where they are bf16 and widened).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from penstock.core.types import CanvasRule
from penstock.engine.folder import model_facts
from penstock.engine.torch.build import EngineConfig
from penstock.engine.torch.diffusion.attention import PackedAttention
from penstock.engine.torch.diffusion.canvas import Canvas
from penstock.engine.torch.diffusion.model import DiffusionModel
from penstock.engine.torch.diffusion.open import llada_name, open_diffusion
from penstock.engine.torch.diffusion.unmask import guess

WIDTH, HEADS, LAYERS, FFN, BLOCK = 256, 4, 4, 512, 32
PROMPT = 64
MMAP_THRESHOLD = -3  # of glibc's mallopt: larger pieces are given back when freed
PUBLISHED_BYTES, OWN_BYTES = 20, 8
SLICES = (1024, 128, 32)
RETENTIONS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Line:
    part: str
    variant: str
    counted_mb: float | None
    peak_mb: float


def status(field: str) -> int:
    """Bytes of a line of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_bytes(body: Callable[[], None]) -> int:
    """In a process of its own."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()

    def child() -> None:
        torch.set_num_threads(1)
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 18)
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        with torch.inference_mode():
            body()
        theirs.send(status("VmHWM") - before)

    process = context.Process(target=child)
    process.start()
    theirs.close()
    found = int(mine.recv())
    process.join()
    return found


def opened(folder: Path, vocab: int, num_blocks: int) -> DiffusionModel:
    """A random LLaDA."""
    shapes = {
        "model.embed_tokens.weight": (vocab, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{each}_proj.weight": (WIDTH, WIDTH) for each in "qkvo"}
        shapes |= {f"{at}.mlp.{each}_proj.weight": (FFN, WIDTH) for each in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (WIDTH, FFN)
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{at}.{each}.weight": (WIDTH,) for each in norms}
    torch.manual_seed(0)
    weights = {
        llada_name(name): torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.05
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
    config = {
        "architectures": ["LLaDAModelLM"], "d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS,
        "mlp_hidden_size": FFN, "vocab_size": vocab, "max_sequence_length": 4096, "weight_tying": True,
        "mask_token_id": vocab - 1, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    engine = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=num_blocks)
    return open_diffusion(model_facts(folder), engine)[0]


def begun(model: DiffusionModel, answers: int, positions: int, retention: float) -> list[Canvas]:
    rule = CanvasRule(retention=retention, delay=0)
    room, found = rule.num_kept(positions), []
    for at in range(answers):
        prompt = [1 + (at * 37 + place) % 1000 for place in range(PROMPT)]
        canvas = Canvas.begun(prompt, positions - PROMPT, rule, model.mask_id, None)
        canvas.slots = torch.arange(at * room, (at + 1) * room)
        found.append(canvas)
    return found


def published(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and confidences as LLaDA's own sampler gets them for a temperature of 1."""
    wide = logits.to(torch.float64)
    noise = torch.rand_like(wide).log_().neg_()
    tokens = wide.exp_().div_(noise).argmax(-1)
    del wide, noise
    chances = logits.to(torch.float64).softmax(-1)
    return tokens, chances.gather(-1, tokens[:, None])


def sampler_lines(model: DiffusionModel, answers: int, positions: int, vocab: int) -> list[Line]:
    rows = answers * positions
    hidden = torch.randn(rows, WIDTH)

    def sliced(count: int, cap: int) -> Callable[[], None]:
        return lambda: void(
            guess(hidden[:count], model.decoder.logits, mask_id=model.mask_id, row_cap=cap)
        )

    def line(variant: str, counted: int, body: Callable[[], None]) -> Line:
        return Line("sampler", variant, counted / 1e6, peak_bytes(body) / 1e6)

    found = [
        line(
            f"published, all {rows} rows",
            rows * vocab * PUBLISHED_BYTES,
            lambda: void(published(model.decoder.logits(hidden))),
        ),
        line(f"ours, all {rows} rows", rows * vocab * OWN_BYTES, sliced(rows, rows)),
    ]
    masked = answers * BLOCK
    for cap in SLICES:
        taken = min(masked, cap)
        variant = f"ours, {masked} masked rows in slices of {cap}"
        found.append(line(variant, taken * vocab * OWN_BYTES, sliced(masked, cap)))
    return found


def void(value: object) -> None:
    """Nothing is kept of it."""


def step_lines(model: DiffusionModel, answers: int, positions: int) -> list[Line]:
    found = []
    for cap in SLICES:
        model.row_cap = cap
        canvases = begun(model, answers, positions, 1.0)
        work = [(canvas, "full") for canvas in canvases]
        peak = peak_bytes(lambda: run(model, work))  # noqa: B023 - run at once
        found.append(Line("step", f"full, slices of {cap}", None, peak / 1e6))
    return found


def run(model: DiffusionModel, work: list) -> None:
    for _ in model.step(work):
        pass


def arena(num_slots: int) -> PackedAttention:
    return PackedAttention(
        num_layers=LAYERS,
        num_slots=num_slots,
        num_kv_heads=HEADS,
        head_dim=WIDTH // HEADS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def kept_lines(model: DiffusionModel, answers: int, positions: int) -> list[Line]:
    model.row_cap, found = 32, []
    for retention in RETENTIONS:
        canvases = begun(model, answers, positions, retention)

        def body(canvases: list[Canvas] = canvases) -> None:
            model.decoder.attention = arena(answers * len(canvases[0].slots))
            for canvas in canvases:
                run(model, [(canvas, "refresh")])
            run(model, [(canvas, "reuse") for canvas in canvases])

        kept = answers * len(canvases[0].kept())
        counted = kept * LAYERS * 2 * WIDTH * 4
        found.append(Line("kept", f"retention {retention}", counted / 1e6, peak_bytes(body) / 1e6))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--kept-answers", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(1)
    answers, positions = told.answers, told.positions
    with TemporaryDirectory() as folder:
        model = opened(Path(folder), told.vocab, num_blocks=8)
    run(model, [(canvas, "full") for canvas in begun(model, 1, 2 * PROMPT, 1.0)])
    lines = sampler_lines(model, answers, positions, told.vocab)
    lines += step_lines(model, answers, positions)
    lines += kept_lines(model, told.kept_answers, positions)
    print(f"{'':10}{'':44}{'counted':>10}{'peak':>10}  MB")
    for line in lines:
        counted = "" if line.counted_mb is None else f"{line.counted_mb:.1f}"
        print(f"{line.part:10}{line.variant:44}{counted:>10}{line.peak_mb:>10.1f}")
    if told.json is not None:
        told.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()
