"""Work spread over a Ray cluster. This file and net.ray_actor import ray, which the extra `cluster` brings.

    ray_map(work, items, "auto", on_result)

Rules
- This Penstock travels with the work: nodes need Python, ray and Penstock's dependencies, and see files under the same
  paths as here.
- As many items are under way as the cluster has cores; the next is sent when one is done.
- An item whose process or node dies is tried once more, by Ray; then its result is the words that say why.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import penstock
from penstock.core.errors import BadConfig, PenstockError, UpstreamFailed, missing_extra

A = TypeVar("A")
B = TypeVar("B")
REACH_S = 5.0
UNSENT = ["*.safetensors", "*.so", "__pycache__"]  # nothing that is simulated needs weights
START_HINT = (
    "start one with `ray start --head`, or name none; one that asks for a token, as those do, is reached with "
    "RAY_AUTH_MODE=token"
)


def ray_map(
    work: Callable[[A], B],
    items: Sequence[A],
    address: str,
    on_result: Callable[[int, B | str], None],
) -> None:
    """Call `on_result(index, result)` for every item, as they come; a text is why an item was lost, twice.

    Raises MissingExtra without ray, UpstreamFailed when the cluster cannot be reached or will not do.
    """
    try:
        import ray  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError:
        raise missing_extra("ray", "cluster") from None
    is_ours = not ray.is_initialized()
    if is_ours:
        connect(ray, address)
    try:
        _map(ray, work, items, on_result)
    finally:
        if is_ours:
            ray.shutdown()


def connect(
    ray: Any,
    address: str,
    *,
    starts: bool = False,
    store_bytes: int | None = None,
    tells: bool = False,
) -> None:
    """Join a cluster. `starts`: where "auto" finds none this machine becomes one, with a store of so many bytes.

    `tells`: what workers write is told on stderr, and they choose their threads themselves.
    """
    _knock(address)
    package = str(Path(penstock.__file__).parent)
    told: dict[str, Any] = {
        "runtime_env": {
            "py_modules": [package],
            "excludes": UNSENT,
            "env_vars": {} if tells else {"OMP_NUM_THREADS": "1"},
        },
        "log_to_driver": tells,
        "logging_level": "ERROR",
    }
    try:
        try:
            ray.init(address=address, **told)
        except ConnectionError:
            if not starts or address != "auto":
                raise
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_worker_niceness", "0")  # else engines yield to all others
            ray.init(object_store_memory=store_bytes, include_dashboard=False, **told)
    except ConnectionError as error:
        raise UpstreamFailed(
            f"no Ray cluster answers at {address!r}: {_first_line(error)}",
            hint=START_HINT,
        ) from None
    except ValueError as error:
        raise BadConfig(
            f"{address!r} is no address of a Ray cluster: {_first_line(error)}",
            hint="write HOST:PORT, ray://HOST:PORT, or auto for a cluster on this machine",
        ) from None
    except RuntimeError as error:  # Ray says so when versions of ray or Python differ
        raise UpstreamFailed(
            f"the Ray cluster at {address!r} cannot be used: {_first_line(error)}",
            hint="the cluster needs the versions of ray and Python that are installed here",
        ) from None


def _knock(address: str) -> None:
    """Raise UpstreamFailed when nobody listens at HOST:PORT. Ray itself would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        raise UpstreamFailed(
            f"no Ray cluster answers at {address!r}: {error}", hint=START_HINT
        ) from None


def _map(
    ray: Any,
    work: Callable[[A], B],
    items: Sequence[A],
    on_result: Callable[[int, B | str], None],
) -> None:
    shared = ray.put(work)
    task = ray.remote(num_cpus=1, max_retries=1)(_do)
    room = max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting, under_way = iter(enumerate(items)), {}

    def send() -> None:
        for index, item in waiting:
            under_way[task.remote(shared, item)] = index
            return

    for _ in range(room):
        send()
    while under_way:
        ready, _ = ray.wait(list(under_way), num_returns=1)
        index = under_way.pop(ready[0])
        try:
            result = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            raise PenstockError(
                f"a worker of the Ray cluster fails: {str(error).strip().splitlines()[-1]}",
                hint="its nodes need the Python and the packages that are installed here",
            ) from None
        except ray.exceptions.RayError as error:
            result = _first_line(error)
        send()
        on_result(index, result)


def _do(work: Callable[[A], B], item: A) -> B:
    return work(item)


def _first_line(error: BaseException) -> str:
    told = str(error).strip()
    return told.splitlines()[0] if told else type(error).__name__
