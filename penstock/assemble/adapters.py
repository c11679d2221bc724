"""The LoRA adapters that a fleet is configured with, and the memory that they get.

What requests call an adapter holds a digest of its files (engine.adapter_folder); in a simulation, which reads none, it
is the bare name.
"""

from __future__ import annotations

from pathlib import Path

from penstock.assemble.config import Config, FleetConfig
from penstock.core.adapters import Adapter
from penstock.engine.adapter_folder import CONFIG, adapter_facts, adapter_key

FEWEST_SLOTS, MOST_SLOTS, LEAST_RANK = 4, 16, 16


def adapters_of(fleet: FleetConfig) -> dict[str, Adapter]:
    """By name. Raises BadModel for folders that cannot be served."""
    found = {}
    for name, path in fleet.adapters.items():
        folder = path.expanduser()
        key = name
        if _is_read(fleet, folder):
            adapter_facts(folder)
            key = adapter_key(name, folder)
        found[name] = Adapter(name, fleet.served_name, key, str(folder))
    return found


def slots_of(config: Config, fleet: FleetConfig) -> int:
    """Adapters that each replica holds at once."""
    if fleet.max_adapters is not None:
        return fleet.max_adapters
    if not (fleet.adapters or config.gateway.runtime_adapters):
        return 0
    return min(max(len(fleet.adapters), FEWEST_SLOTS), MOST_SLOTS)


def rank_of(fleet: FleetConfig) -> int:
    """The largest that each replica holds."""
    if fleet.adapter_rank is not None:
        return fleet.adapter_rank
    folders = [path.expanduser() for path in fleet.adapters.values()]
    ranks = [adapter_facts(folder).most_ranks for folder in folders if _is_read(fleet, folder)]
    return max(LEAST_RANK, *ranks) if ranks else LEAST_RANK


def _is_read(fleet: FleetConfig, folder: Path) -> bool:
    return fleet.executor.kind == "torch" or (folder / CONFIG).is_file()
