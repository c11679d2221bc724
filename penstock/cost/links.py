"""What moving KV between replicas takes: setup and bytes over the link's bandwidth.

seconds = setup_s + tokens * kv_bytes / (lanes * gb_s)          lanes: devices that send their part side by side
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from penstock.core.config import build, load_toml
from penstock.core.errors import BadConfig
from penstock.core.schema import check_schema
from penstock.cost.shapes import ModelShape

LINKS = Path(__file__).with_name("links.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """See links.toml for meanings."""

    name: str
    gb_s: float
    setup_s: tuple[float, float]
    as_of: str
    source: str

    def seconds(self, num_bytes: float, *, lanes: int = 1, is_slow: bool = False) -> float:
        return self.setup_s[is_slow] + num_bytes / (lanes * self.gb_s * 1e9)

    def kv_seconds(self, shape: ModelShape, tokens: int, *, tp: int = 1) -> float:
        """Of the KV of `tokens` positions, each of `tp` devices sending its part."""
        return self.seconds(tokens * shape.kv_bytes, lanes=tp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    schema: int
    link: tuple[Link, ...]


@functools.cache
def read_links(path: Path = LINKS) -> dict[str, Link]:
    table = load_toml(path)
    schema = table.get("schema")
    check_schema(str(path), schema if isinstance(schema, int) else 0)
    return {link.name: link for link in build(Links, table).link}


def link_of(name: str, path: Path = LINKS) -> Link:
    """Raises BadConfig that names the known ones."""
    known = read_links(path)
    if name not in known:
        raise BadConfig(f"no link is named {name!r}; known: {', '.join(sorted(known))}")
    return known[name]
