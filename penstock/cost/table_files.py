"""Where AIConfigurator's packages keep what they measured, and reading it. Data only: neither is ever imported.

    aiconfigurator-core   systems/data/SYSTEM/FAMILY/ENGINE/VERSION/FILE.parquet      FAMILY: gemm, attention, moe, comm
    aiconfigurator        systems/data/SYSTEM/ENGINE/VERSION/FILE.parquet             of older engines

The first that has the wanted version answers. Versions are those that products of matrices were measured with; a file
that such a version lacks is the next older one's, and the name of the tables says so. NCCL has versions of its own, of
which the newest is taken.

Rows hold latencies in milliseconds; of several kernels for the same sizes the fastest counts. What was read stays in
memory.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from penstock.core.errors import BadConfig, missing_extra
from penstock.cost.grid import Point

SYSTEMS = {
    "a100-80g": "a100_sxm",
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
FAMILIES = {
    "gemm_perf": "gemm",
    "generation_attention_perf": "attention",
    "context_attention_perf": "attention",
    "moe_perf": "moe",
    "custom_allreduce_perf": "comm",
}
VERSIONED_BY = "gemm_perf"
NCCL = "nccl_perf"
NOT_EVERYWHERE = ("window_size",)  # older tables know no windows
MILLI = 1e-3


@dataclass(frozen=True, slots=True)
class Package:
    """One of the two. `has_families`: folders by kind of operator lie above those of engines."""

    module: str
    distribution: str
    has_families: bool


PACKAGES = (
    Package("aiconfigurator_core", "aiconfigurator-core", True),
    Package("aiconfigurator", "aiconfigurator", False),
)
HINTS = {
    "aiconfigurator-core": "newer ones come with: pip install 'penstock[tables]'",
    "aiconfigurator": "older ones are in another package: pip install --no-deps aiconfigurator==0.10.0 "
    "(only its data is used; never with what it asks for, an old numpy)",
}


@dataclass(frozen=True, slots=True)
class TableFiles:
    """The files of one engine's version on one system. `package`: its name and version."""

    package: str
    root: Path
    engine: str
    version: str
    has_families: bool

    @property
    def name(self) -> str:
        return f"{self.package} {self.root.name} {self.engine} {self.version}"

    def path(self, file: str) -> Path | None:
        """Of this version or else the next older one that has it."""
        folder = _folder(self.root, self.engine, file, self.has_families)
        known = [one for one in _versions(folder, file) if _order(one) <= _order(self.version)]
        return folder / known[-1] / f"{file}.parquet" if known else None

    def needed(self, file: str) -> Path:
        found = self.path(file)
        if found is None:
            raise BadConfig(f"{self.name} has no {file}: it was not measured")
        return found

    def nccl(self) -> Path | None:
        folder = self.root / "comm" / "nccl" if self.has_families else self.root / "nccl"
        known = _versions(folder, NCCL)
        return folder / known[-1] / f"{NCCL}.parquet" if known else None

    def told(self, paths: Iterable[Path]) -> str:
        """The name, and which of the files are of other versions."""
        others = [
            f"{path.stem} of {path.parts[-3]} {path.parts[-2]}"
            for path in paths
            if path.parts[-2] != self.version
        ]
        return f"{self.name} ({', '.join(others)})" if others else self.name


def find_tables(card: str, engine: str | None) -> TableFiles:
    """Of "vllm 0.24", or of "vllm" the newest. Raises MissingExtra, BadConfig that lists what is there."""
    if card not in SYSTEMS:
        raise BadConfig(f"AIConfigurator has no tables of {card}; it has: {', '.join(SYSTEMS)}")
    name, _, version = (engine or "vllm").partition(" ")
    homes = [(package, home) for package in PACKAGES if (home := _home(package)) is not None]
    if not homes:
        raise missing_extra(PACKAGES[0].module, "tables")
    told = []
    for package, home in homes:
        root = home / "systems" / "data" / SYSTEMS[card]
        known = _versions(_folder(root, name, VERSIONED_BY, package.has_families), VERSIONED_BY)
        titled = f"{package.distribution} {_version_of(package, home.parent)}".strip()
        for one in reversed(known):
            if not version or one == version or one.startswith(f"{version}."):
                return TableFiles(titled, root, name, one, package.has_families)
        told.append(f"{titled} has: {', '.join(f'{name} {one}' for one in known) or 'none'}")
    absent = {one.distribution for one in PACKAGES} - {one.distribution for one, _ in homes}
    raise BadConfig(
        f"there are no tables of {engine or name} on {card}; {'; '.join(told)}",
        hint="; ".join(HINTS[one] for one in sorted(absent)),
    )


def _home(package: Package) -> Path | None:
    """Where it is installed; the older one brings the newer one's module, but no data in it."""
    spec = find_spec(package.module)
    if spec is None or spec.origin is None:
        return None
    home = Path(spec.origin).parent
    return home if (home / "systems").is_dir() else None


def _folder(root: Path, engine: str, file: str, has_families: bool) -> Path:
    return root / FAMILIES[file] / engine if has_families else root / engine


def _versions(folder: Path, file: str) -> list[str]:
    """Oldest first."""
    found = {path.parent.name for path in folder.glob(f"*/{file}.parquet")}
    return sorted(found, key=_order)


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", version))


def _version_of(package: Package, place: Path) -> str:
    """What lies beside the data says its version; "" when nothing does."""
    for found in Distribution.discover(name=package.distribution, path=[str(place)]):
        return found.version
    return ""


@functools.cache
def read_points(path: Path, sizes: tuple[str, ...], **wanted: str | int) -> Mapping[Point, float]:
    """Seconds by `sizes` of the rows that have the wanted values. Raises BadConfig, MissingExtra."""
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise missing_extra("pyarrow", "lab") from None
    columns = parquet.read_schema(path).names
    missing = [
        name
        for name in (*sizes, "latency", *wanted)
        if name not in columns and name not in NOT_EVERYWHERE
    ]
    if missing:
        raise BadConfig(f"{path} has no column {', '.join(missing)}")
    rows = [(name, "==", value) for name, value in wanted.items() if name in columns]
    read: Any = parquet.read_table(path, columns=[*sizes, "latency"], filters=rows or None)
    found: dict[Point, float] = {}
    at: Any = zip(*(read[name].to_pylist() for name in sizes), strict=True)
    for point, latency in zip(at, read["latency"].to_pylist(), strict=True):
        seconds = float(latency) * MILLI
        found[point] = min(seconds, found.get(point, seconds))
    return found


@functools.cache
def digest_of(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).digest()
