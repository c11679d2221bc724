"""Small changes to a model that many requests of one fleet choose among: what is known of them outside engines."""

from __future__ import annotations

from typing import NamedTuple


class Adapter(NamedTuple):
    """A LoRA adapter that is served: its name, the model it belongs to, what requests call it, and its folder."""

    name: str
    model: str
    key: str
    folder: str


class AdapterReport(NamedTuple):
    """Adapters of a replica: which are resident, how many were loaded since the start, how many made way for others."""

    resident: tuple[str, ...]
    num_loads: int
    num_evictions: int
