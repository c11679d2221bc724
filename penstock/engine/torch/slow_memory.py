"""What lies behind the device's memory of keys and values: host memory, and a disk behind that.

    jobs      `host_blocks` that engine.swap moves jobs to
    tiers     `tier_blocks` more of host memory, and `disk_blocks` of a file, for cached blocks (engine.tiers)

Both are of one piece of host memory, and numbered on.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from penstock.core.errors import BadConfig
from penstock.core.plans import Filed, Filing, Moved, Plan, Transfer
from penstock.core.ports import Completion
from penstock.core.types import BlockHash
from penstock.engine.tier_config import TiersConfig
from penstock.engine.torch.mover import Mover
from penstock.engine.torch.ports import Movable
from penstock.engine.torch.shared import KvTransport, region_of, shared_behind
from penstock.engine.torch.shelf import Shelf, stride_of

if TYPE_CHECKING:
    from penstock.engine.torch.build import EngineConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Behind:
    """`identity`: of the weights, for what a disk keeps from one start to the next; `name`: of the replica."""

    host_blocks: int = 0
    copy_threads: int = 4
    tiers: TiersConfig = TiersConfig()
    name: str = "replica"
    identity: str = ""


class SlowMemory:
    """One executor's. Completions are told on the loop's thread."""

    def __init__(
        self,
        backend: object,
        behind: Behind,
        tell: Callable[[Completion], None],
        transport: KvTransport | None = None,
    ) -> None:
        """`transport`: by which peers read it. Raises BadConfig where blocks cannot be copied, or the disk cannot be
        had."""
        if not isinstance(backend, Movable):
            raise BadConfig(
                "keys and values of this kind of model cannot be moved to host memory",
                hint="leave out cache.swap and cache.tiers",
            )
        arena, tiers = backend.arena, behind.tiers
        block_bytes = arena.numel() * arena.element_size() // arena.shape[1]
        self.block_bytes = block_bytes
        self.tier_blocks, _ = tiers.blocks(block_bytes)
        _, self.disk_blocks = tiers.blocks(stride_of(block_bytes))
        self._tell = tell
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopped = False
        num_blocks = behind.host_blocks + self.tier_blocks
        host = None
        if transport is not None and arena.device.type == "cpu":
            host = shared_behind(arena, num_blocks, transport)
        self._mover = Mover(
            arena, num_blocks, threads=behind.copy_threads, tell=self._hear_moved, host=host
        )
        self._shelf: Shelf | None = None
        if self.disk_blocks:
            about = f"{behind.identity}, {type(backend).__name__}, {arena.dtype}, {tuple(arena.shape[2:])}"
            digest = hashlib.sha256(about.encode()).hexdigest()
            self._shelf = Shelf(
                tiers.folder / f"{quote(behind.name, safe='')}.kv",
                region_of(self._mover.host),
                num_slots=self.disk_blocks,
                identity=digest,
                tell=self._hear_filed,
            )

    @property
    def found(self) -> Sequence[tuple[BlockHash, int]]:
        """What the disk held when it was opened."""
        return () if self._shelf is None else self._shelf.found

    def transfer(self, transfer: Transfer) -> None:
        assert not self._is_stopped, "asked for after stop"
        assert transfer.runs, "a transfer of nothing"
        self._loop = asyncio.get_running_loop()
        self._mover.begin(transfer)

    def file(self, filing: Filing) -> None:
        assert not self._is_stopped, "asked for after stop"
        assert self._shelf is not None and filing.pairs, "there is no disk, or nothing to file"
        self._loop = asyncio.get_running_loop()
        self._shelf.begin(filing)

    def waits_of(self, plan: Plan) -> Sequence[threading.Event]:
        return self._mover.waits_of(plan)

    def close(self) -> None:
        """Return when what was begun has been copied; nobody hears of it."""
        self._is_stopped = True
        self._mover.close()
        if self._shelf is not None:
            self._shelf.close()

    # ------------------------------------------------------------------ on workers' threads

    def _hear_moved(self, transfer: int) -> None:
        self._hop(lambda at: Moved(transfer, at))

    def _hear_filed(self, filing: int, bad: tuple[int, ...], error: str | None) -> None:
        self._hop(lambda at: Filed(filing, at, bad, error))

    def _hop(self, told: Callable[[float], Completion]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._say, told)

    def _say(self, told: Callable[[float], Completion]) -> None:
        if not self._is_stopped:
            self._tell(told(asyncio.get_running_loop().time()))


def open_behind(
    backend: object,
    folder: Path,
    config: EngineConfig,
    tell: Callable[[Completion], None],
    transport: KvTransport | None = None,
) -> SlowMemory | None:
    """None where nothing is asked for."""
    if not config.host_blocks and config.tiers.host_bytes is None:
        return None
    facts = (config.dtype, config.weights, config.kv, config.block_size, config.max_context)
    behind = Behind(
        host_blocks=config.host_blocks,
        copy_threads=config.copy_threads,
        tiers=config.tiers,
        name=config.name,
        identity=identity_of(folder, *facts),
    )
    return SlowMemory(backend, behind, tell, transport if config.shows_host else None)


def identity_of(folder: Path, *facts: object) -> str:
    """The files that a model's weights come from, by size and time, and what else decides its keys and values."""
    told = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.glob("*") if folder.is_dir() else [folder])
        if path.is_file()
    ]
    return repr((told, facts))
