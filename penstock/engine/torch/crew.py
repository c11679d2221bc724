"""Tensor parallelism: one model over several processes.

    rank 0    the executor's process: schedules nothing either, but owns the jobs, samples and answers
    rank 1..  `python -c ... crew.main()`: read arrays of a step from standard input, run the same forward on their
              shard, take part in the sums, forget the result

Heads and MLP are split, sums and the head's columns go over gloo (CPU) or nccl (CUDA). Nothing can hang: a rank ends
when its input ends (so also when rank 0 dies), a dead rank breaks the connection that its peers wait on, and a
silent one runs into TIMEOUT. After any failure in the middle of a step the ranks no longer stand at the same
piece, so the crew is ended and every later step is told why.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import IO, Protocol, cast

import msgspec
import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo, Store, TCPStore, Work

from penstock.core.errors import BadModel, PenstockError, StepFailed
from penstock.engine.folder import ModelFacts, model_facts
from penstock.engine.torch.build import Built, EngineConfig, build_decoder, choose_device
from penstock.engine.torch.step import StepArrays

HOST = "127.0.0.1"
TIMEOUT = timedelta(minutes=10)
GRACE_S = 2.0
LOADED = "penstock-rank-loaded"
PROGRAM = (
    "import sys, json; told = json.loads(sys.argv[1]); sys.path[:] = told['path']; "
    "from penstock.engine.torch.crew import main; main(told)"
)


class _Group(Protocol):
    """What gloo and nccl groups both offer; torch's own stubs leave it out."""

    def allreduce(self, tensors: list[Tensor]) -> Work: ...
    def allgather(self, into: list[list[Tensor]], tensors: list[Tensor]) -> Work: ...


class GroupRank:
    """One rank of several; see decoder.Rank. `connect` must be called on all ranks before the first step."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world = rank, world
        self._device = device
        self._group: _Group | None = None

    def connect(self, store: Store) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            from torch._C._distributed_c10d import ProcessGroupNCCL  # only CUDA builds have it

            options = ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            self._group = cast(_Group, ProcessGroupNCCL(store, self.rank, self.world, options))
        else:
            self._group = cast(_Group, ProcessGroupGloo(store, self.rank, self.world, TIMEOUT))

    def reduce(self, x: Tensor) -> Tensor:
        assert self._group is not None
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def join(self, x: Tensor) -> Tensor:
        assert self._group is not None
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.world)]
        self._group.allgather([parts], [x]).wait()
        return torch.cat(parts, -1)


class TorchCrew:
    """Ranks 1.. as child processes of rank 0."""

    def __init__(self, ranks: list[subprocess.Popen[bytes]], store: TCPStore) -> None:
        self._ranks, self._store = ranks, store
        self._broken: str | None = None

    @classmethod
    def hire(cls, facts: ModelFacts, config: EngineConfig) -> tuple[TorchCrew, Built]:
        """Start the other ranks and load all shards. Raises BadModel, BadConfig."""
        world = config.tensor_parallel
        rank = GroupRank(0, world, choose_device(config.device))
        built = build_decoder(facts, config, rank, None)
        store = TCPStore(HOST, 0, world, is_master=True, wait_for_workers=False)
        told = {
            "path": sys.path,
            "folder": str(facts.folder),
            "config": told_of(config),
            "num_blocks": built.num_blocks,
            "port": store.port,
        }
        crew = cls([_spawn(told | {"rank": at}) for at in range(1, world)], store)
        try:
            for child in crew._ranks:
                _await_loaded(child)
            rank.connect(store)
        except (PenstockError, RuntimeError) as error:
            crew.close()
            if isinstance(error, PenstockError):
                raise
            raise BadModel(f"the {world} processes could not connect: {error}") from None
        built.notes["ranks"] = f"{world} processes"
        return crew, built

    @property
    def broken(self) -> str | None:
        """Why no step can be run any more; None while it can."""
        return self._broken

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._ranks]

    def begin(self, arrays: StepArrays) -> None:
        if self._broken is not None:
            raise StepFailed(self._broken)
        payload = pickle.dumps(tuple(arrays), protocol=pickle.HIGHEST_PROTOCOL)
        for child in self._ranks:
            try:
                assert child.stdin is not None
                child.stdin.write(len(payload).to_bytes(8, "little") + payload)
                child.stdin.flush()
            except OSError:
                raise self.abandon(StepFailed("a rank's input is closed")) from None

    def abandon(self, error: BaseException) -> BaseException:
        """End all ranks; they are out of step with this one."""
        codes = [_exit_code(child) for child in self._ranks]
        dead = [
            f"rank {at} (exit code {code})" for at, code in enumerate(codes, 1) if code is not None
        ]
        self.close()
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        if dead:
            self._broken = f"a process of this model died: {', '.join(dead)}; restart the server"
        else:
            self._broken = f"the processes of this model lost step after an error ({reason}); restart the server"
        return StepFailed(self._broken)

    def close(self) -> None:
        """Ranks end when their input does; one stuck in a sum is ended."""
        for child in self._ranks:
            if child.stdin is not None:
                try:
                    child.stdin.close()
                except OSError:  # what was buffered can no longer be written: the rank is gone
                    pass
        for child in self._ranks:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdout is not None:
                child.stdout.close()


def _exit_code(child: subprocess.Popen[bytes]) -> int | None:
    """None while it runs. A connection breaks a moment before its process counts as ended: give it that moment."""
    try:
        return child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        return None


def _spawn(told: dict[str, object]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _await_loaded(child: subprocess.Popen[bytes]) -> None:
    """Read until the rank says it has loaded its shard. Raises BadModel with the rank's own words."""
    assert child.stdout is not None
    last = b""
    for line in child.stdout:
        if line.strip() == LOADED.encode():
            return
        last = line.strip() or last
    raise BadModel(
        f"a process of this model ended while loading: {last.decode(errors='replace') or 'no word'}",
        hint="its messages stand above; out of memory is a likely cause",
    )


def told_of(config: EngineConfig) -> str:
    """Folders are said as text."""
    return msgspec.json.encode(config, enc_hook=str).decode()


def config_of(told: str) -> EngineConfig:
    return msgspec.json.decode(told, type=EngineConfig, dec_hook=lambda kind, text: kind(text))


def main(told: dict[str, object]) -> None:
    """Rank 1..: load, connect, run what comes in, until the input ends."""
    config = config_of(str(told["config"]))
    at = told["rank"]
    num_blocks, port = told["num_blocks"], told["port"]
    assert isinstance(at, int) and isinstance(num_blocks, int) and isinstance(port, int)
    answers = sys.stdout
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rank = GroupRank(at, config.tensor_parallel, choose_device(config.device, at))
    try:
        built = build_decoder(model_facts(Path(str(told["folder"]))), config, rank, num_blocks)
    except PenstockError as error:
        answers.write(f"{error.message}\n")
        return
    answers.write(f"{LOADED}\n")
    answers.flush()
    store = TCPStore(HOST, port, config.tensor_parallel, is_master=False)
    rank.connect(store)
    with torch.inference_mode():
        while (arrays := _receive(sys.stdin.buffer)) is not None:
            _follow(built, arrays)


def _receive(stream: IO[bytes]) -> StepArrays | None:
    """The next step from the process that started this one; None when it is gone."""
    size = stream.read(8)
    if len(size) < 8:
        return None
    payload = stream.read(int.from_bytes(size, "little"))
    if len(payload) < int.from_bytes(size, "little"):
        return None
    return StepArrays(*pickle.loads(payload))


def _follow(built: Built, arrays: StepArrays) -> None:
    forward = built.decoder.forward(arrays.on(built.device))
    while True:
        try:
            next(forward)
        except StopIteration as end:
            hidden = end.value
            break
    if built.decoder.is_head_split:
        for part in arrays.logit_slices():
            built.decoder.logits(hidden[part])
