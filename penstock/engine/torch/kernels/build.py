"""Compiles the kernels once and remembers the result.

The library holds one variant per instruction set that this processor has, all from the same source. It includes no
torch header, so it compiles in seconds and does not depend on torch's ABI; tensors are passed as addresses.

The result lives in a folder named by everything that can change it: sources, compiler, flags, processor, torch.
Two processes that start together compile once (file lock), and a reader never sees half a file (rename).
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.core.cache_folder import cache_folder

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "source"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
LIMIT_S = 600


class BuildFailed(Exception):
    """There is no library, for the reason given; whoever asked computes with torch instead."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One instruction set: how wide its vectors are, how to ask the compiler for it, what the processor must have."""

    name: str
    lane_bytes: int
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()

    def command(self) -> list[str]:
        return [*self.flags, f"-DVARIANT={self.name}", f"-DLANE_BYTES={self.lane_bytes}"]


_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX512_FLAGS = (*(f"-m{name}" for name in _AVX512), "-mfma")

PORTABLE = Variant("portable", 16)
AVX2 = Variant("avx2", 32, ("-mavx2", "-mfma"), frozenset({"avx2", "fma"}))
AVX512 = Variant("avx512", 64, _AVX512_FLAGS, frozenset(_AVX512))
AVX512_VNNI = Variant(
    "avx512vnni",
    64,
    (*_AVX512_FLAGS, "-mavx512vnni"),
    frozenset({*_AVX512, "avx512_vnni"}),
)
AVX512_BF16 = Variant(
    "avx512bf16",
    64,
    (*_AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16", "-DDOT_BF16"),
    frozenset({*_AVX512, "avx512_vnni", "avx512_bf16"}),
)
# The AVX-512 variants with their vectors and their special instructions made of ordinary ones: for tests.
EMULATED_BF16 = Variant("emulated_bf16", 64, ("-O1", "-DDOT_BF16", "-DEMULATE_DOT"))

BEST_FIRST = (AVX512_BF16, AVX512_VNNI, AVX512, AVX2, PORTABLE)


def processor_flags() -> frozenset[str]:
    """What the kernel says this processor can do; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def usable_variants() -> tuple[Variant, ...]:
    flags = processor_flags()
    return tuple(variant for variant in BEST_FIRST if variant.needs <= flags)


def default_cache() -> Path:
    return cache_folder("kernels")


def find_compiler() -> str:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildFailed("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def build(
    cache: Path | None = None,
    *,
    compiler: str | None = None,
    variants: Sequence[Variant] | None = None,
) -> Path:
    """The compiled library, made now if it is not in the cache."""
    compiler = compiler or find_compiler()
    variants = tuple(variants if variants is not None else usable_variants())
    folder = cache or default_cache()
    target = folder / _key(compiler, variants) / "penstock_kernels.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / "lock"):
            if not target.exists():
                _compile(compiler, variants, target)
    except OSError as error:
        raise BuildFailed(f"cannot build in {folder}: {error}") from error
    return target


def _key(compiler: str, variants: Sequence[Variant]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    version = _run([compiler, "--version"])
    parts = (compiler, version, FLAGS, [v.command() for v in variants], platform.machine())
    digest.update(repr((parts, torch.__version__, sorted(processor_flags()))).encode())
    return digest.hexdigest()[:24]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError as error:
        raise BuildFailed("kernels are built on POSIX systems only") from error
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, variants: Sequence[Variant], target: Path) -> None:
    logger.info("compiling the CPU kernels (%s)", ", ".join(v.name for v in variants))
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        jobs = {
            v.name: _start(
                [compiler, *FLAGS, *v.command(), "-c", "variant.cpp"], folder / f"{v.name}.o"
            )
            for v in variants
        }
        jobs["entry"] = _start([compiler, *FLAGS, "-c", "entry.cpp"], folder / "entry.o")
        objects = []
        for part, job in jobs.items():
            if _succeeded(part, job):
                objects.append(str(folder / f"{part}.o"))
        made = folder / target.name
        _run([compiler, "-shared", "-pthread", "-o", str(made), *objects])
        os.replace(made, target)


def _start(command: list[str], output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, "-o", str(output)],
        cwd=SOURCE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _succeeded(part: str, job: subprocess.Popen[str]) -> bool:
    """An older compiler may not know an instruction set: then that variant is left out. Others must compile."""
    try:
        text, _ = job.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        job.kill()
        # Another time it may be quicker: a library without this variant would be kept for good.
        raise BuildFailed(f"compiling {part} took more than {LIMIT_S} s") from None
    if job.returncode == 0:
        return True
    if part in ("entry", PORTABLE.name):
        raise BuildFailed(f"the compiler failed on {part}: {text[-2000:]}")
    logger.warning("the %s kernels are left out: the compiler said %s", part, text[-500:])
    return False


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"cannot run {command[0]}: {error}") from error
    if done.returncode != 0:
        raise BuildFailed(f"{' '.join(command[:2])} failed: {done.stderr[-2000:]}")
    return done.stdout
