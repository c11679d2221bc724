"""Modules that were compiled to C are found before their sources, if somebody has compiled these very sources.

What a simulated step costs is Python finding out, call by call, what it could have known: which class, which field,
which number. `penstock compile` (lab.compiling) has mypyc translate the modules named here, with the types they have
anyway, and keeps the result outside of the package, in a folder named by a digest over the sources and the Python they
are for. So a source that was changed is never shadowed by what it was: its digest names another folder. All sources of
the package count, not these modules alone: mypyc reads a field of a named tuple by its place, takes constants in, and
must know which classes others inherit from, wherever these are defined. Nothing here needs a compiler, and without the
folder, or with PENSTOCK_COMPILED=off, everything is plain Python. Both give the same results to the byte.

Standard library only: this is imported before anything else.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec

TYPE_CHECKING = False  # as type checkers read it; `typing` takes as long to import as all of this
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

SWITCH = "PENSTOCK_COMPILED"
PACKAGE = os.path.dirname(os.path.dirname(__file__))
DONE = "done"  # a file that names what the folder holds when it is whole

# What nearly every simulated step and request runs through. A module that reads files beside itself, or that is little
# else than records of msgspec or coroutines, gains nothing; and read-only dataclasses cannot be pickled once they are
# compiled, nor can classes with slots of their own. Packages stay plain: a compiled one finds what was compiled alone.
MODULES = (
    "core.arrivals", "core.canvas", "core.clock", "core.images", "core.job",
    "cost.energy", "cost.roofline", "cost.step",
    "engine.briefing", "engine.encodings", "engine.flights", "engine.fork", "engine.host",
    "engine.joblist", "engine.launch", "engine.ledger", "engine.moves", "engine.outcomes",
    "engine.partings", "engine.parts", "engine.pauses", "engine.replica", "engine.reports", "engine.roster",
    "engine.run", "engine.turn",
    "policy.admit.full_fit", "policy.batch.decodes", "policy.batch.vllm_v1", "policy.order.fcfs", "policy.route.least",
    "traffic.azure", "traffic.mooncake", "traffic.rows", "traffic.trace",
    "net.outbox",
    "sim.agenda", "sim.channel", "sim.executor",
    "report.account", "report.histogram", "report.log", "report.metrics",
    "cluster.dispatches", "cluster.fleet", "cluster.link", "cluster.router", "cluster.sight", "cluster.ticket",
    "lab.play",
)  # fmt: skip


class CompiledFinder:
    """Finds modules by name in one folder, and nothing else."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = files

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self.files.get(fullname)
        if file is None:
            return None
        loader = ExtensionFileLoader(fullname, file)
        spec = ModuleSpec(fullname, loader, origin=file)
        spec.has_location = True
        return spec


def root() -> str:
    """Where what was compiled is kept, of all versions."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "penstock", "compiled")


def folder() -> str:
    """Where these sources are kept when they are compiled for this Python and this C library."""
    from hashlib import blake2b

    digest = blake2b(repr((EXTENSION_SUFFIXES[0], sys.version, _libc())).encode(), digest_size=12)
    for path in _sources():
        with open(path, "rb") as source:
            text = source.read()
        digest.update(f"{os.path.relpath(path, PACKAGE)} {len(text)}\n".encode())
        digest.update(text)
    return os.path.join(root(), digest.hexdigest())


def _sources() -> list[str]:
    """All of the package."""
    found = []
    for parent, _, names in os.walk(PACKAGE):
        found += [os.path.join(parent, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _libc() -> str | None:
    """A home may be that of several machines, of which an older one could not load what a newer one has compiled."""
    has_name = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})
    return os.confstr("CS_GNU_LIBC_VERSION") if has_name else None


def files_in(place: str) -> dict[str, str]:
    """The compiled modules of a folder, by full name."""
    suffix, found = EXTENSION_SUFFIXES[0], {}
    for parent, _, names in os.walk(place):
        inside = os.path.relpath(parent, place)
        before = "" if inside == "." else inside.replace(os.sep, ".") + "."
        for name in names:
            if name.endswith(suffix):
                found[before + name.removesuffix(suffix)] = os.path.join(parent, name)
    return found


def whole(place: str) -> dict[str, str]:
    """The compiled modules of a folder that holds all it was made with; none of any other.

    One that has lost a file, as caches may, is of no use: compiled classes do not go with plain ones.
    """
    try:
        with open(os.path.join(place, DONE), encoding="utf-8") as done:
            names = done.read().split()
    except OSError:
        return {}
    found = files_in(place)
    return found if names and found.keys() == set(names) else {}


def install() -> None:
    """Have compiled modules found from now on, if there are any. Once, before anything else of penstock."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0") or not os.path.isdir(root()):
        return
    try:
        files = whole(folder())
    except OSError:  # sources that cannot be read
        return
    if files:
        sys.meta_path.insert(0, CompiledFinder(files))


def is_active() -> bool:
    """Whether this process uses compiled modules."""
    return any(isinstance(finder, CompiledFinder) for finder in sys.meta_path)
