"""One linear layer by method and rows, beside what a plain read of memory gets in the same process.

    python benchmarks/linear_methods.py [--shape 4096x1024] [--threads 1] [--rows 1,8,256] [--isa avx2] [--json FILE]
    python benchmarks/linear_methods.py --errors

One row is a race along the memory bus: "read" is the share of a plain read's bytes a second at which the weights passed
(scales included), the least of which a method can take. With many rows "Gop/s" counts two operations a weight and row.
Besides our methods, torch's own products in 8 bits (fbgemm's and oneDNN's, where this torch has them), which quantise
rows too. `--isa` chooses an instruction set of our kernels other than the best here.

Weights rotate through copies that no cache holds. Processor time of the calling thread with one thread, else wall time;
the methods take turns, and each figure is the lower fifth of its turns, since the machine may be busy.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.torch.kernels import available
from penstock.engine.torch.kernels import library as native
from penstock.engine.torch.kernels.build import find_compiler
from penstock.engine.torch.kernels.linear import PackedLinear
from penstock.engine.torch.kernels.quantised import PackedQuantised
from penstock.engine.torch.kernels.shorts import ShortsLinear
from penstock.engine.torch.linear import (
    OneDnnLinear,
    PlainLinear,
    WidenedLinear,
    has_bf16_instructions,
)
from penstock.engine.torch.ports import Linear, LinearMethod, ShardSpec
from penstock.engine.torch.quantised import Bits, quantise

COLD_BYTES = 96 << 20
PIECE_BYTES = 4 << 20
FEW_ROWS = 8
ENGINES = torch.backends.quantized.supported_engines
FORMS: tuple[tuple[Bits, int], ...] = ((8, 128), (8, 32), (4, 128), (4, 32))
READER = """
typedef float Part __attribute__((vector_size(32)));
extern "C" float read_all(const float* from, long count) {
    Part a = {}, b = {}, c = {}, d = {};
    for (long i = 0; i < count; i += 32) {
        a += *(const Part*)(from + i), b += *(const Part*)(from + i + 8);
        c += *(const Part*)(from + i + 16), d += *(const Part*)(from + i + 24);
    }
    a += b, c += d, a += c;
    return a[0];
}
"""
Layer = Callable[[Tensor], object]


@dataclass
class Method:
    name: str
    dtype: torch.dtype
    layers: Sequence[Layer]
    num_bytes: int
    is_slow: bool = False  # several times slower than all others
    seconds: dict[int, list[float]] = field(default_factory=dict)
    turn: int = 0


def reader() -> Method:
    """A plain read in pieces of some megabytes, as a method among the others."""
    folder = Path(tempfile.mkdtemp())
    (folder / "read.cpp").write_text(READER)
    flags = ["-O3", "-march=native", "-Wno-psabi", "-shared", "-fPIC"]
    command = [find_compiler(), *flags, str(folder / "read.cpp"), "-o", str(folder / "read.so")]
    subprocess.run(command, check=True, capture_output=True)
    read = ctypes.CDLL(str(folder / "read.so")).read_all
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_long), ctypes.c_float
    numbers = torch.empty(COLD_BYTES // 4)
    if available():
        native.load().large_pages(numbers.data_ptr(), COLD_BYTES)
    pieces = numbers.fill_(1).split(PIECE_BYTES // 4)

    def made(piece: Tensor) -> Layer:
        return lambda _: read(piece.data_ptr(), len(piece))

    return Method("a plain read", torch.float32, [made(piece) for piece in pieces], PIECE_BYTES)


def copies(make: Callable[[], Layer], num_bytes: int) -> list[Layer]:
    return [make() for _ in range(max(2, COLD_BYTES // num_bytes))]


def of_numbers(weight: Tensor, isa: str | None) -> list[Method]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        methods: list[LinearMethod] = [PlainLinear()]
        if dtype == torch.float32 or has_bf16_instructions():
            methods.append(OneDnnLinear())
        if dtype == torch.bfloat16:
            methods.append(WidenedLinear())
        if available():
            methods.append(PackedLinear(isa=isa))
        if available() and dtype == torch.bfloat16:
            methods.append(ShortsLinear(isa=isa))
        for method in methods:
            width = 4 if method.name == "widened" else dtype.itemsize
            num_bytes = weight.numel() * width
            kind = "shorts" if isinstance(method, ShortsLinear) else method.name

            def make(method: LinearMethod = method, dtype: torch.dtype = dtype) -> Linear:
                return method.pack(weight.to(dtype, copy=True), None, ShardSpec())

            name = f"{str(dtype).removeprefix('torch.')} {kind}"
            is_slow = name == "bfloat16 plain" and not has_bf16_instructions()
            found.append(Method(name, dtype, copies(make, num_bytes), num_bytes, is_slow))
    return found


def of_few_bits(weight: Tensor, isa: str | None) -> list[Method]:
    found = []
    for bits, group in FORMS if available() else ():
        few, method = quantise(weight, bits, group), PackedQuantised(isa=isa)
        num_bytes = method.pack_quantised(few, None).num_bytes  # type: ignore[attr-defined]
        layers = copies(lambda few=few, m=method: m.pack_quantised(few, None), num_bytes)  # type: ignore[misc]
        found.append(Method(f"int{bits} of {group}", torch.bfloat16, layers, num_bytes))
    return found + [
        torchs_bytes(weight, engine) for engine in ("fbgemm", "onednn") if engine in ENGINES
    ]


def torchs_bytes(weight: Tensor, engine: str) -> Method:
    """Torch's own layer of 8 bits, by one of its libraries."""
    warnings.simplefilter("ignore", UserWarning)  # torch is about to drop these
    whole = torch.quantize_per_tensor(weight, float(weight.abs().max()) / 127, 0, torch.qint8)
    op = torch.ops.quantized

    def make() -> Layer:
        torch.backends.quantized.engine = engine  # of what is packed now
        packed = op.linear_prepack(whole, None)
        return lambda x: op.linear_dynamic(x, packed, reduce_range=engine == "fbgemm")

    layers = copies(make, weight.numel())
    return Method(f"int8 {engine}", torch.float32, layers, weight.numel())


def errors(rows: int = 64, inputs: int = 1024, outputs: int = 512) -> None:
    """What products of bfloat16 lose, of their size, before and after they are rounded to bfloat16."""
    for name, peaks in (("normal numbers", 0), ("an input in 100 of a row 100 times greater", 100)):
        x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
        x = torch.where(torch.rand(x.shape) < 0.01, peaks * x, x) if peaks else x
        wanted = x.double() @ weight.double().T
        layer = ShortsLinear().pack(weight, None, ShardSpec())
        found = {
            "shorts": layer(x.float()),
            "shorts, rounded": layer(x),
            "floats, rounded": PackedLinear().pack(weight, None, ShardSpec())(x),
        }
        lost = {
            kind: float((one.double() - wanted).norm() / wanted.norm())
            for kind, one in found.items()
        }
        print(f"{name}: " + "; ".join(f"{kind} {one:.2g}" for kind, one in lost.items()))


def measure(methods: Sequence[Method], rows: int, inputs: int, threads: int) -> None:
    clock = time.thread_time if threads == 1 else time.perf_counter
    for turn in range(40 if rows <= FEW_ROWS else 10):
        for method in methods:
            if rows > FEW_ROWS and method.is_slow and turn > 1:
                continue
            x = torch.randn(rows, inputs).to(method.dtype)
            method.turn += 1
            layer = method.layers[method.turn % len(method.layers)]
            begin = clock()
            layer(x)
            method.seconds.setdefault(rows, []).append(clock() - begin)


def low(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="4096x1024", help="outputs x inputs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="1,8,32,256,512")
    parser.add_argument("--isa", choices=native.isas(), help="of our kernels; the best by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--errors", action="store_true", help="of 16-bit products, and no speeds")
    args = parser.parse_args()
    if args.errors:
        return errors()
    torch.set_num_threads(args.threads)
    outputs, inputs = map(int, args.shape.split("x"))
    all_rows = [int(word) for word in args.rows.split(",")]
    weight, read = torch.randn(outputs, inputs), reader()
    methods = [read, *of_numbers(weight, args.isa), *of_few_bits(weight, args.isa)]
    for rows in all_rows:
        measure(methods, rows, inputs, args.threads)
    speed = PIECE_BYTES / low(read.seconds[all_rows[0]])
    print(f"a plain read: {speed / 1e9:.1f} GB/s on one thread; us, by rows")
    print(f"{'':18}" + "".join(f"{rows:>9}" for rows in all_rows) + "     read  Gop/s")
    for method in methods[1:]:
        us = [1e6 * low(method.seconds[rows]) for rows in all_rows]
        share = method.num_bytes / low(method.seconds[all_rows[0]]) / speed
        most = 2e-3 * all_rows[-1] * outputs * inputs / us[-1]
        row = "".join(f"{one:9.0f}" for one in us)
        print(f"{method.name:18}{row} {100 * share:7.0f}% {most:6.0f}")
    for bits, group in FORMS:
        lost = (quantise(weight, bits, group).expand() - weight).square().mean() / weight.var()
        print(f"int{bits} of {group}: {float(lost):.2g} of the variance of normal weights is lost")
    if args.json:
        found = {method.name: method.seconds for method in methods}
        told = {
            "shape": args.shape,
            "threads": args.threads,
            "isa": args.isa,
            "read": speed,
            "seconds": found,
        }
        args.json.write_text(json.dumps(told))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
