"""What a trace is, in a few letters: the digest of its file, and of every file that a workload reads besides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from penstock.core.config import load_toml
from penstock.traffic import Trace
from penstock.traffic.formats import WORKLOAD
from penstock.traffic.workload import PATH_KEYS


def trace_digest(trace: Trace) -> str:
    """The sha256 of the file; of a workload, of that and the files and folders it names."""
    own = trace.sha256()
    if trace.format != WORKLOAD:
        return own
    found = hashlib.sha256(own.encode())
    for name in _named(load_toml(trace.path)):
        path = trace.path.parent / name
        files = (
            sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        )
        for each in files:
            if each.is_file():
                found.update(f"{each.relative_to(path.parent)}\0".encode())
                found.update(hashlib.sha256(each.read_bytes()).digest())
    return found.hexdigest()


def _named(value: object, key: str = "") -> Iterator[str]:
    """The paths in a workload's table."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _named(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner, key)
    elif isinstance(value, str) and key in PATH_KEYS:
        yield value
