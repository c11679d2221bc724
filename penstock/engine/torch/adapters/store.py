"""The adapters of one engine: their folders by key, which slot each resident one has, and the thread that loads.

Which adapter gets which slot, and when, is decided where jobs are (engine.residents): a slot is given away only when no
job uses what it holds. Loading reads the folder again, so that what is not resident costs no memory; the page cache
of the system makes that a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from penstock.core.errors import BadModel, PenstockError
from penstock.engine.adapter_folder import adapter_facts, adapter_key, name_of
from penstock.engine.torch.adapters.bank import BankForm
from penstock.engine.torch.adapters.places import places_of
from penstock.engine.torch.adapters.read import as_bank_entries, read_adapter
from penstock.engine.torch.cores import compute_with
from penstock.engine.torch.decoder import Decoder
from penstock.engine.torch.kernels import available
from penstock.engine.torch.linear import has_bf16_instructions

if TYPE_CHECKING:
    from penstock.engine.torch.build import Built, EngineConfig

OnLoaded = Callable[[str, int, str | None], None]  # key, slot, why it could not be loaded


class AdapterStore:
    """`begin` answers on the loading thread; slots are noted by whoever hears of that."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int,
        rank: int,
        device: torch.device,
        folders: Mapping[str, Path],
    ) -> None:
        dtype = decoder.embedding.dtype
        if device.type == "cpu" and (available() or not has_bf16_instructions()):
            dtype = torch.float32  # what our kernels take, and elsewhere what is not slow
        form = BankForm(slots=slots, rank=rank, dtype=dtype, device=device)
        self._places, self._rank, self._decoder = places_of(decoder, form), rank, decoder
        self._folders = dict(folders)
        self._slots: dict[str, int] = {}
        self._guard = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None
        decoder.adapted = self._places.layers
        if decoder.spaces is not None:
            decoder.spaces.takes_adapters = self._places.can_record
        for key in folders:
            self.check(key)

    @property
    def num_bytes(self) -> int:
        """Held by all banks now."""
        return self._places.num_bytes

    def slot_of(self, key: str) -> int | None:
        """None: not resident."""
        return self._slots.get(key)

    def know(self, key: str, folder: Path) -> None:
        """Where it is, from now on."""
        self._folders[key] = folder

    def check(self, key: str) -> None:
        """Read all of it, and keep nothing. On any thread. Raises BadModel."""
        read_adapter(adapter_facts(self._folders[key]), self._places, self._rank)

    def begin(self, key: str, slot: int, tell: OnLoaded) -> None:
        """Load into a slot that nobody uses; returns at once."""
        for other in [name for name, taken in self._slots.items() if taken == slot]:
            del self._slots[other]
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "penstock-adapters", compute_with, (1,))
        self._worker.submit(self._load, key, slot, tell)

    def settle(self, key: str, slot: int) -> None:
        """It is there."""
        self._slots[key] = slot

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)

    def _load(self, key: str, slot: int, tell: OnLoaded) -> None:
        reason: str | None = None
        try:
            self._fill(key, slot)
        except PenstockError as error:
            reason = error.message
        except Exception as error:  # noqa: BLE001 - the outermost loop of this thread
            reason = (
                f"the adapter {name_of(key)!r} cannot be loaded: {type(error).__name__}: {error}"
            )
        tell(key, slot, reason)

    def _fill(self, key: str, slot: int) -> None:
        folder = self._folders.get(key)
        if folder is None:
            raise BadModel(f"this engine has no adapter {name_of(key)!r}")
        if key != name_of(key) and adapter_key(name_of(key), folder) != key:
            raise BadModel(
                f"the files of adapter {name_of(key)!r} have changed since it was loaded",
                hint="unload it and load it again",
            )
        found = read_adapter(adapter_facts(folder), self._places, self._rank)
        before = self._places.arrays
        with torch.inference_mode():
            for bank, factors in as_bank_entries(self._places, found):
                bank.put(slot, factors)
        if self._places.arrays != before:  # who has recorded them records anew
            self._decoder.adapted = list(self._places.layers)


def open_adapters(built: Built, config: EngineConfig) -> AdapterStore | None:
    """None where none can be used. Raises BadModel for one that cannot be served."""
    if not config.max_adapters:
        return None
    store = AdapterStore(
        built.decoder,
        slots=config.max_adapters,
        rank=config.adapter_rank,
        device=built.device,
        folders=config.adapters,
    )
    built.notes["adapters"] = f"{config.max_adapters} at once, of ranks up to {config.adapter_rank}"
    return store
