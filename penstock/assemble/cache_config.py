"""The part of the configuration about blocks of KV memory."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine.peers import PeersConfig
from penstock.engine.swap import Store, SwapConfig
from penstock.engine.tier_config import TiersConfig


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Blocks of KV memory of one replica. Both sizes None: what fits beside the weights.

    `swap`: host memory that jobs are evicted to instead of being computed again; see engine.swap. `store`: how prompts
    are found again, by the hashes of their blocks (engine.ledger) or in a tree of prefixes (engine.radix).
    `tiers`: host memory and disk that cached prefixes go to and come back from; see engine.tiers.
    `peers`: replicas fetch cached prefixes from each other ({} as it is, None: never); see engine.seeks.
    """

    block_size: int = 16
    num_blocks: int | None = None
    memory_bytes: int | None = None
    prefix: bool = True
    store: Store = "hash"
    swap: SwapConfig = SwapConfig()
    tiers: TiersConfig = TiersConfig()
    peers: PeersConfig | None = None

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {self.num_blocks}")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ValueError(f"memory_bytes must be at least 1, got {self.memory_bytes}")
        if self.tiers.host_bytes is not None and not (self.prefix and self.store == "hash"):
            raise ValueError('tiers keep cached prefixes: they need prefix = true and store "hash"')
        if self.peers is not None and not (self.prefix and self.store == "hash"):
            raise ValueError('peers show cached prefixes: they need prefix = true and store "hash"')
