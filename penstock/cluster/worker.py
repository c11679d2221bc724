"""The engine's process: `python -m penstock.cluster.worker`, started by penstock.cluster.process and by nobody else.

It reads one line of JSON from stdin (endpoint and spec), opens the executor, and serves one replica on the channel
until told to stop. It lives as long as its parent wants: SIGINT and SIGTERM, which reach whole groups of processes, are
left to the parent, and when the parent dies the kernel kills it (Linux) or stdin ends (everywhere). One that is to
outlive its parent is killed with it only until it is ready; then it has a door, where the next one finds it
(cluster.doorway). What it logs goes to stderr, which the parent reads. Exit codes: 0 told to stop, 3 could not start
(it said why), 1 a bug.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from penstock.cluster.doorway import Doorway
from penstock.cluster.logs import close_log, header_of, open_log
from penstock.cluster.predictors import predictors_of_model, profile_of
from penstock.cluster.silence import BEAT_S
from penstock.cluster.spec import (
    Outside,
    ReplicaSpec,
    lanes_of,
    open_host,
    step_jobs_of,
    step_tokens_of,
)
from penstock.core.errors import BadConfig, PenstockError, missing_extra
from penstock.core.messages import Failed, Message
from penstock.core.ports import Channel, Log
from penstock.core.rng import stream
from penstock.core.types import Caps
from penstock.engine.host import Host
from penstock.net.codec import Codec
from penstock.net.zmq import ZmqChannel, flush_closed

PR_SET_PDEATHSIG = 1
CANNOT_START = 3


@dataclass(frozen=True, slots=True)
class Door:
    """Where an engine that outlives its parent is found, and for how long it waits to be."""

    path: Path
    for_s: float


EXTRA = ("torch", "safetensors")  # packages of the extra `engine`
_log = logging.getLogger("penstock.engine")


def open_torch(spec: ReplicaSpec) -> Outside:
    """The real leaf: torch on this machine. Raises BadModel, MissingExtra and the like."""
    # Here, as torch is for this process only.
    from penstock.engine.torch.machine import among
    from penstock.engine.torch.open import EngineConfig, open_leaf

    wanted = spec.executor
    config = EngineConfig(
        device=wanted.device,
        dtype=wanted.dtype,
        weights=wanted.weights,
        kv=wanted.kv,
        tensor_parallel=wanted.tensor_parallel,
        threads=wanted.threads,
        num_blocks=spec.num_blocks,
        memory_bytes=spec.memory_bytes,
        step_tokens=step_tokens_of(spec.policies),
        step_jobs=step_jobs_of(spec.policies),
        max_context=wanted.max_context,
        block_size=spec.block_size,
        lanes=lanes_of(wanted, spec.policies),
        must_have_lanes=wanted.lanes is not None,
        host_blocks=spec.swap.host_blocks,
        copy_threads=spec.swap.threads,
        tiers=spec.tiers,
        name=spec.name,
        max_adapters=spec.max_adapters,
        adapter_rank=spec.adapter_rank,
        adapters=spec.adapters,
        speculation=spec.speculation,
        compiler=wanted.compiler,
        kernel_cache=wanted.kernel_cache,
        packed_cache=wanted.packed_cache,
        niceness=wanted.niceness,
        graphs=wanted.graphs,
        graph_batch=wanted.graph_batch,
        shares_kv=spec.neighbours.count > 1 or spec.kv.reaches_far,
        kv_link=spec.kv,
        shows_host=spec.peers is not None,
        lends=spec.lends,
        expert_devices=wanted.expert_devices,
        expert_standby=wanted.expert_standby,
        seed=stream(spec.seed, spec.name, "engine").getrandbits(63),  # replicas draw differently
    )
    config = among(config, count=spec.neighbours.count, index=spec.neighbours.index)
    executor = open_leaf(spec.model, config, wanted.canvas)
    _check(spec, executor.caps)
    for subject, note in executor.notes.items():
        _log.info("%s: %s", subject, note)
    return Outside(
        executor=executor,
        num_blocks=executor.num_blocks,
        predictors=predictors_of_model(spec.executor, spec.model, spec.lengths),
        log=_open_log(spec),
        about=f"{executor.notes['device']}, {executor.notes['dtype'].partition(':')[0]}",
        adapters=getattr(executor, "adapters", None),
        transport=getattr(executor, "transport", None),
        reshaper=getattr(executor, "reshaper", None),
    )


def _open_log(spec: ReplicaSpec) -> Log:
    profile = profile_of(spec.executor)
    digest = profile.digest if profile else ""
    return open_log(
        spec.log_dir, header_of(spec.name, config=spec.config, seed=spec.seed, profile=digest)
    )


def _check(spec: ReplicaSpec, caps: Caps) -> None:
    """Raises BadConfig where what was asked for does not go with this kind of model."""
    if caps.canvas is not None and spec.policies["batch"]["name"] != "diffusion":
        raise BadConfig(
            f"{spec.model} is a diffusion language model, which batch policy "
            f"{spec.policies['batch']['name']} cannot run",
            hint="use --policy dllm-serve",
        )
    if spec.lends and not caps.lends:
        raise BadConfig(
            "this kind of model cannot keep context elsewhere", hint="leave the fleet's lends out"
        )
    if caps.host_blocks < spec.swap.host_blocks:
        raise BadConfig(
            "this kind of model cannot move jobs to host memory",
            hint="leave cache.swap.host_blocks out",
        )
    if spec.tiers.host_bytes is not None and not caps.tier_blocks:
        raise BadConfig(
            "this kind of model has no blocks that could be kept in host memory",
            hint="leave cache.tiers out",
        )


async def serve(
    spec: ReplicaSpec,
    endpoint: str,
    open_outside: Callable[[ReplicaSpec], Outside],
    door: Door | None = None,
) -> int:
    """Serve until stopped; the exit code."""
    channel = ZmqChannel.connect(endpoint, Codec(Message))
    if door is None:
        _end_with_stdin()
    code = await serve_on(spec, channel, open_outside, door)
    if code == CANNOT_START:
        flush_closed()
    return code


async def serve_on(
    spec: ReplicaSpec,
    channel: Channel,
    open_outside: Callable[[ReplicaSpec], Outside],
    door: Door | None = None,
) -> int:
    """As `serve`, on any channel."""
    try:
        outside = open_outside(spec)
    except PenstockError as error:
        await _say_failed(channel, error)
        return CANNOT_START
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        await _say_failed(channel, missing_extra(package, "engine"))
        return CANNOT_START
    _keep_what_was_loaded()
    host = open_host(spec, channel, outside, beat_s=BEAT_S)
    doorway = None if door is None else await _open_door(spec, host, door)
    try:
        await host.run()
    finally:
        if doorway is not None:
            doorway.close()
        close_log(outside.log)
    return 0


async def _open_door(spec: ReplicaSpec, host: Host, door: Door) -> Doorway:
    """From now on it outlives its parent."""

    def end() -> None:
        ending.append(asyncio.get_running_loop().create_task(host.stop()))

    ending: list[asyncio.Task[None]] = []
    host.orphan_s = door.for_s
    doorway = Doorway(door.path, spec, adopt=host.adopt, end=end)
    await doorway.open()
    _die_with_parent(is_bound=False)
    return doorway


def _keep_what_was_loaded() -> None:
    """Modules and weights stay for good: looking through them again and again would take a few percent of a step.

    What packing left behind goes back to the system, which the allocator would keep for itself.
    """
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


async def _say_failed(channel: Channel, error: PenstockError) -> None:
    with contextlib.suppress(PenstockError):
        await channel.send(Failed(type(error).__name__, error.message, error.hint))
    await channel.close()


def _end_with_stdin() -> None:
    """The parent holds the other end of stdin: when it ends, so do we."""

    def read() -> None:
        if not os.read(0, 1 << 16):
            os._exit(1)

    asyncio.get_running_loop().add_reader(0, read)


def _die_with_parent(*, is_bound: bool = True) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    if sys.platform == "linux":
        number = signal.SIGKILL if is_bound else 0
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def _set_title(title: str) -> None:
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle  # type: ignore[import-not-found, unused-ignore]

        setproctitle(title)


def main(open_outside: Callable[[ReplicaSpec], Outside] = open_torch) -> int:
    _die_with_parent()
    line = os.fdopen(os.dup(0), "rb", buffering=0).readline()
    if not line:
        return 1
    order = json.loads(line)
    spec = ReplicaSpec.from_json(order["spec"])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _set_title(f"penstock engine {spec.name}")
    told = order.get("door")
    door = None if told is None else Door(Path(told["path"]), told["for_s"])
    return asyncio.run(serve(spec, order["endpoint"], open_outside, door))


if __name__ == "__main__":
    sys.exit(main())
