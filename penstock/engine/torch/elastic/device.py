"""The program of a device process: `python -c ... device.main()`.

It loads torch and the kernels, says that it is ready and waits: so far it is a standby. Told to map an arena it is a
device, and multiplies rows by the experts that it was told to have. Orders are carried out by a thread of their own,
so that experts are copied and read while others are computed with. It ends when either line does, so also when the
replica's process dies.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path

import torch

from penstock.core.errors import PenstockError
from penstock.engine.folder import model_facts
from penstock.engine.torch.build import methods_of
from penstock.engine.torch.cores import compute_with
from penstock.engine.torch.crew import config_of
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.elastic.exchange import Exchange
from penstock.engine.torch.elastic.orders import Drop, Map, Peer, Rest, Stock, Threads, heard
from penstock.engine.torch.elastic.pages import Packed, Pages, Place
from penstock.engine.torch.kernels import available, build_with
from penstock.engine.torch.load import Packer
from penstock.engine.torch.load_mixture import load_expert
from penstock.engine.torch.mlp import PlainMlp
from penstock.engine.torch.ports import DTYPES
from penstock.engine.torch.weights import WeightFolder


@dataclass(slots=True)
class Device:
    """What one process holds."""

    told: dict[str, str]
    experts: dict[Place, PlainMlp] = field(default_factory=dict)
    peers: dict[int, Pages] = field(default_factory=dict)
    pages: Pages | None = None
    exchange: Exchange | None = None
    threads: int = 1

    def obey(self, order: object, orders: Connection) -> None:
        if isinstance(order, Map):
            self.pages = Pages(recv_handle(orders), order.page_bytes)
            memory = recv_handle(orders)
            self.exchange = Exchange(memory, order.form)
            os.close(memory)
            self.threads = order.threads
        elif isinstance(order, Peer):
            assert self.pages is not None
            self.peers[order.device] = Pages(recv_handle(orders), self.pages.page_bytes)
        elif isinstance(order, Stock):
            self._stock(order)
        elif isinstance(order, Drop):
            assert self.pages is not None
            for place, page in order.pages:
                self.experts.pop(place, None)
                self.pages.drop(page)
        elif isinstance(order, Threads):
            self.threads = order.count
        elif isinstance(order, Rest):
            self.experts.clear()
            self.peers.clear()
            self.pages = self.exchange = None
            gc.collect()
        else:
            raise AssertionError(f"a device is never told {order!r}")

    def _stock(self, order: Stock) -> None:
        pages = self.pages
        assert pages is not None, "stocked before it was mapped"
        for place, page, device, there in order.copied:
            pages.copy(self.peers[device], there, page)
            self.experts[place] = pages.read(page)
        if order.read:
            packer = self._packer()
            for place, page in order.read:
                pages.write(page, Packed(load_expert(packer, *place)))
                self.experts[place] = pages.read(page)
            packer.folder.close()
        for place, page in order.kept:
            self.experts[place] = pages.read(page)
        self.peers.clear()

    def _packer(self) -> Packer:
        config = config_of(self.told["config"])
        facts = model_facts(Path(self.told["folder"]))
        dtype, device = DTYPES[self.told["dtype"]], torch.device("cpu")
        shape = facts.shape.serving(config.max_context or facts.shape.max_context)
        methods = methods_of(config, device, dtype)
        folder = WeightFolder(facts.folder, dtype, device)
        return Packer(folder, shape, methods.layers, Alone(), methods.quantised)

    def work(self, message: bytes) -> None:
        layer, num_rows, segments = heard(message)
        assert self.exchange is not None, "work for a standby"
        if torch.get_num_threads() != self.threads:
            compute_with(self.threads)
        x, rows, parts = self.exchange.x[:num_rows], self.exchange.rows, self.exchange.parts
        for expert, at, count in segments:
            some = x[rows[at : at + count]]
            parts[at : at + count] = self.experts[layer, expert](some, {})


def _take_orders(device: Device, orders: Connection) -> None:
    with torch.inference_mode():
        while True:
            try:
                order = orders.recv()
            except (EOFError, OSError):
                os._exit(0)
            answer: tuple[str, str] | None = None
            try:
                device.obey(order, orders)
            except PenstockError as error:
                answer = (error.message, error.hint)
            except Exception as error:  # noqa: BLE001 - the outermost loop: an order may fail, the device not
                answer = (f"{type(error).__name__}: {error}", "")
            orders.send(answer)


def main(told: dict[str, str], orders_fd: int, work_fd: int) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    config = config_of(told["config"])
    build_with(config.compiler, config.kernel_cache)
    available()
    gc.collect()
    gc.freeze()
    orders, work = Connection(orders_fd), Connection(work_fd)
    device = Device(told)
    orders.send(None)
    threading.Thread(target=_take_orders, args=(device, orders), daemon=True).start()
    with torch.inference_mode():
        while True:
            try:
                message = work.recv_bytes()
            except (EOFError, OSError):
                return
            answer = b""
            try:
                device.work(message)
            except Exception as error:  # noqa: BLE001 - the outermost loop: a step may fail, the device not
                answer = f"{type(error).__name__}: {error}".encode()
            work.send_bytes(answer)


def main_of(argument: str) -> None:
    told = json.loads(argument)
    main(told["told"], told["orders"], told["work"])
