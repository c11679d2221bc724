"""How fast this machine reads memory: the roof of decoding, where every token reads every weight once.

    figure = bytes read / second, by so many threads that each read a part of their own

The loop is compiled C (64 bytes in sixteen sums at a time, which compilers turn into vectors); the memory is far larger
than any cache. Without a compiler numpy's dot product reads, which gets a tenth less, and the figure says so.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.clock import now

if TYPE_CHECKING:
    import numpy as np

SIZE_BYTES = 1 << 29
LOOP = """
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t *from, size_t count) {
    uint64_t sums[16] = {0}, all = 0;
    for (size_t at = 0; at + 16 <= count; at += 16)
        for (int lane = 0; lane < 16; lane++) sums[lane] ^= from[at + lane];
    for (int lane = 0; lane < 16; lane++) all ^= sums[lane];
    return all;
}
"""
Read = Callable[[int, int], object]  # address and bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSpeed:
    """Bytes a second of the clock, and of this process's processor time (all its threads together)."""

    by: str
    threads: int
    wall_bytes_s: float
    cpu_bytes_s: float


class Reader:
    """Holds the memory that is read."""

    def __init__(self, threads: int, size_bytes: int = SIZE_BYTES) -> None:
        self._memory = mmap.mmap(-1, size_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._array = _as_numbers(self._memory)
        self._array[:] = 1.0
        self._threads = threads
        self._read, self._by = loop()

    def measure(self) -> ReadSpeed:
        """One pass."""
        address, size = self._array.ctypes.data, self._array.nbytes
        part = size // self._threads // 128 * 128
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(lambda _: None, range(self._threads)))  # the threads are there
            began, spent = now(), _processor_s()
            list(pool.map(lambda i: self._read(address + i * part, part), range(self._threads)))
            took, spent = now() - began, _processor_s() - spent
        count = part * self._threads
        return ReadSpeed(
            by=self._by, threads=self._threads, wall_bytes_s=count / took, cpu_bytes_s=count / spent
        )


def _as_numbers(memory: mmap.mmap) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    import numpy as np

    return np.frombuffer(memory, dtype=np.float32)


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@cache
def loop() -> tuple[Read, str]:
    """The loop, and what it is."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    compiled = None if compiler is None else _compiled(compiler)
    return (_dot, "numpy's dot product") if compiled is None else (compiled, "a compiled loop")


def _compiled(compiler: str) -> Read | None:
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(LOOP)
        flags = ("-O3", "-march=native", "-shared", "-fPIC")
        try:
            subprocess.run(
                [compiler, *flags, str(source), "-o", str(library)], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        read_all = ctypes.CDLL(str(library)).read_all
    read_all.restype, read_all.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_size_t]
    return lambda address, size: read_all(address, size // 8)


def _dot(address: int, size: int) -> object:
    import numpy as np

    told = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    numbers = np.frombuffer(told, dtype=np.float32)
    return numbers @ numbers
