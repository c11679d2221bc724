"""Many independent points, run in parallel, each kept as soon as it is done.

    results = run_points(points, work, store=Path("results/points.jsonl"), processes=None, on_progress=show)

`work(point)` gives a dict of JSON values. With several processes it must be importable by name: a function of a module,
a `functools.partial` of one, or an instance of a module's class.

Rules
- A point's key is the digest of its JSON: settings, seed, digests of what it reads, versions. `versions` holds a
  digest of Penstock's own source, so that after an edit of a policy nothing stale is taken for its result.
- The store is a file of JSON lines: a header, then a line a point, on the disk before the next is begun. A run skips
  the points that the store holds, whatever their order; a torn last line counts for nothing. One run at a time has it.
- A point that raises is kept with its error and harms no other; the next run tries it again. So does a point whose
  process was killed twice.
- Results come back in the order of the points, and are the same from the store, in one process or in many.
- Ctrl-C (KeyboardInterrupt) stops the workers and passes on; what was done is kept.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import penstock
from penstock.core.errors import BadConfig, PenstockError
from penstock.core.schema import check_schema
from penstock.core.types import SCHEMA
from penstock.lab.workers import Lost, cores, map_in_processes

Json = dict[str, object]
KIND = "points"
NEEDLESS = ("verbs", "gateway", "learn")  # rooms that change no result
SOURCES = {".py", ".toml", ".json"}


@functools.cache
def versions_here() -> Mapping[str, str]:
    """What results depend on beside their settings: Penstock's version and source, numpy's version."""
    root = Path(penstock.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.suffix in SOURCES and inside.parts[0] not in NEEDLESS:
            found.update(f"{inside}\0".encode() + path.read_bytes() + b"\0")
    return {
        "penstock": penstock.__version__,
        "code": found.hexdigest()[:16],
        "numpy": importlib.metadata.version("numpy"),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """`settings` are JSON values; `inputs` names the files that are read, each by its sha256."""

    settings: Mapping[str, object]
    seed: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions_here)

    def to_dict(self) -> Json:
        return {
            "settings": dict(self.settings),
            "seed": self.seed,
            "inputs": dict(self.inputs),
            "versions": dict(self.versions),
        }

    @property
    def key(self) -> str:
        """The same for equal points, on every machine."""
        text = json.dumps(self.to_dict(), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """`value` is None when there is an `error`. `is_kept`: it was in the store already. `cpu_s`: what it took."""

    point: Point
    key: str
    value: Json | None = None
    error: str | None = None
    trace: str = ""
    cpu_s: float = 0.0
    is_kept: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comes back from where a point was worked at. The value as JSON text: what cannot be kept fails there."""

    value: str | None = None
    error: str | None = None
    trace: str = ""
    cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """`work`, with what it raises as an outcome."""

    work: Callable[[Point], Json]

    def __call__(self, point: Point) -> Outcome:
        begun_s = _cpu_s()
        try:
            value = json.dumps(self.work(point), allow_nan=False)
        except PenstockError as error:
            return Outcome(error=str(error), cpu_s=_cpu_s() - begun_s)
        except Exception as error:  # noqa: BLE001 - a bug in one point is that point's result
            told = f"{type(error).__name__}: {error}"
            return Outcome(error=told, trace=traceback.format_exc(), cpu_s=_cpu_s() - begun_s)
        return Outcome(value=value, cpu_s=_cpu_s() - begun_s)


def _cpu_s() -> float:
    spent = os.times()
    return spent.user + spent.system


class Store:
    """The file of results. Use it inside `with`; the `found` are those of earlier runs, by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Json] = {}

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise BadConfig(
                f"cannot keep results in {self.path}: {error.strerror or error}"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise BadConfig(
                f"another run keeps its results in {self.path}",
                hint="wait for it, or choose another folder",
            ) from None
        try:
            self._read()
        except PenstockError:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, result: Result) -> None:
        """Return when the line is on the disk."""
        self._append(
            {
                "key": result.key,
                **result.point.to_dict(),
                "value": result.value,
                "error": result.error,
                "trace": result.trace,
                "cpu_s": result.cpu_s,
            }
        )

    def _read(self) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole, _, torn = text.rpartition(b"\n")
        if torn:  # of a run that was cut off while it wrote
            self._file.truncate(len(text) - len(torn))
        lines = whole.splitlines()
        if not lines:
            self._append({"schema": SCHEMA, "kind": KIND})
            return
        records = [_record(line) for line in lines]
        head = records[0]
        if head is None or head.get("kind") != KIND:
            raise BadConfig(f"{self.path} holds no results of points", hint="choose another file")
        schema = head.get("schema")
        check_schema(str(self.path), schema if isinstance(schema, int) else 0)
        for record in records[1:]:
            if record is not None and record.get("error") is None:
                self.found[str(record["key"])] = record

    def _append(self, record: Json) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _record(line: bytes) -> Json | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def run_points(
    points: Sequence[Point],
    work: Callable[[Point], Json],
    *,
    store: Path | None = None,
    processes: int | None = None,
    ray: str | None = None,
    on_progress: Callable[[int, int, Result], None] | None = None,
) -> list[Result]:
    """The results of all points, in their order. `on_progress(done, total, result)` is called as each is done.

    `processes` None: a process a core; 1: in this process, where `work` may be any callable. `ray`: the address of a
    cluster ("auto" finds one), in place of processes here.
    """
    if processes is not None and processes < 1:
        raise BadConfig(f"processes must be at least 1, got {processes}")
    if store is None:
        return _Run(points, None, on_progress).results(work, processes, ray)
    with Store(store) as kept:
        return _Run(points, kept, on_progress).results(work, processes, ray)


class _Run:
    """One call of run_points: what is done, and where it is kept and told."""

    def __init__(
        self,
        points: Sequence[Point],
        store: Store | None,
        on_progress: Callable[[int, int, Result], None] | None,
    ) -> None:
        self._store, self._on_progress = store, on_progress
        self._keys = [point.key for point in points]
        self._by_key = dict(zip(self._keys, points, strict=True))
        self._done: dict[str, Result] = {}

    def results(
        self, work: Callable[[Point], Json], processes: int | None, ray: str | None
    ) -> list[Result]:
        found = {} if self._store is None else self._store.found
        for key, point in self._by_key.items():
            if key in found:
                self._end(_kept(point, found[key]))
        keys = [key for key in self._by_key if key not in self._done]
        self._work(work, keys, processes, ray)
        return [self._done[key] for key in self._keys]

    def _work(
        self,
        work: Callable[[Point], Json],
        keys: Sequence[str],
        processes: int | None,
        ray: str | None,
    ) -> None:
        attempt, items = Attempt(work), [self._by_key[key] for key in keys]

        def on_result(index: int, outcome: Outcome | Lost) -> None:
            self._finish(items[index], keys[index], outcome)

        if ray is not None and items:
            from penstock.net.ray import ray_map

            ray_map(
                attempt,
                items,
                ray,
                lambda index, found: on_result(
                    index, found if isinstance(found, Outcome) else Lost(found)
                ),
            )
        elif processes == 1 or not items:
            for index, item in enumerate(items):
                on_result(index, attempt(item))
        else:
            map_in_processes(attempt, items, processes=processes or cores(), on_result=on_result)

    def _finish(self, point: Point, key: str, outcome: Outcome | Lost) -> None:
        if isinstance(outcome, Lost):
            result = Result(point=point, key=key, error=f"{outcome.why}, twice")
        else:
            result = Result(
                point=point,
                key=key,
                value=None if outcome.value is None else json.loads(outcome.value),
                error=outcome.error,
                trace=outcome.trace,
                cpu_s=round(outcome.cpu_s, 3),  # as the store keeps it
            )
        if self._store is not None:
            self._store.add(result)
        self._end(result)

    def _end(self, result: Result) -> None:
        self._done[result.key] = result
        if self._on_progress is not None:
            self._on_progress(len(self._done), len(self._by_key), result)


def _kept(point: Point, record: Json) -> Result:
    value, cpu_s = record["value"], record["cpu_s"]
    assert isinstance(value, dict) and isinstance(cpu_s, (int, float))
    return Result(point=point, key=point.key, value=value, cpu_s=cpu_s, is_kept=True)
