"""Published runs of real vLLM: what was asked, when its tokens came, and under which settings. One folder a run.

    requests.jsonl   a line each: request_id, input_toks, output_toks, arrival_time (wall clock), and on the engine's
                     clock queued_ts, scheduled_ts, first_token_ts, last_token_ts
    meta.json        vllm_version, model, engine_kwargs; where it was written, kv_cache and hardware too
    config.json      the hardware's name

The format is that of LLMServingSim's bench examples. The two clocks are tied by the request that was queued soonest
after it arrived: what the API took for that one (a millisecond or two) is not seen, what others waited beyond it is.
The engine takes its inputs between steps, so that wait is real, and TTFT counts from the arrival.

Nothing says which prompts share a beginning, so none do. What a preempted request computed may still be cached when
it comes back, as in vLLM, so every prompt has block hashes of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from penstock.core.errors import BadTrace
from penstock.core.prompt import HashedPrompt, private_hashes
from penstock.core.types import Request, RequestId, Sampling
from penstock.traffic import TraceMeta

CARDS = {
    "RTX4090": "rtx-4090",
    "RTXPRO6000": "rtx-pro-6000",
    "H100": "h100",
    "H200": "h200",
    "A100": "a100-80g",
    "L40S": "l40s",
}
BLOCK_SIZE = 16
NOT_QUEUED_S = 1e-3  # scheduled as soon as the engine looked


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Of one answer."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """One request of a run. `at` counts from the first arrival."""

    id: str
    at: float
    num_prompt: int
    num_output: int
    real: Latency
    is_queued: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmLog:
    """One run. `num_blocks` None: the log does not say how much KV memory there was."""

    folder: Path
    name: str
    version: str
    model: str
    hardware: str
    tp: int
    max_jobs: int
    max_tokens: int
    num_blocks: int | None
    requests: tuple[Logged, ...]

    @property
    def card(self) -> str:
        return CARDS[self.hardware]

    @property
    def shape(self) -> str:
        """The name of the model's shape."""
        return self.model.rpartition("/")[2].lower()

    @property
    def engine(self) -> str:
        return "vllm " + ".".join(self.version.split(".")[:2])


class Replay:
    """The requests of a run, or the first so many, as traffic."""

    def __init__(self, log: VllmLog, limit: int | None = None) -> None:
        self._requests = log.requests[:limit]
        self._model = log.shape
        self.meta = TraceMeta(str(log.folder), "vllm log")

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        for one in self._requests:
            hashes = private_hashes(one.id, one.num_prompt // BLOCK_SIZE)
            self.meta.rows_read += 1
            self.meta.rows_kept += 1
            self.meta.prompt_tokens += one.num_prompt
            self.meta.output_tokens += one.num_output
            self.meta.last_at_s = one.at
            request = Request(
                id=RequestId(one.id),
                model=self._model,
                prompt=HashedPrompt(one.num_prompt, hashes, BLOCK_SIZE),
                sampling=Sampling(max_tokens=one.num_output),
                true_output=one.num_output,
            )
            yield one.at, request
        self.meta.is_whole = True


def latency_of(arrived_at: float, first_at: float, last_at: float, num_output: int) -> Latency:
    tpot_s = (last_at - first_at) / max(1, num_output - 1)
    return Latency(ttft_s=first_at - arrived_at, tpot_s=tpot_s, e2e_s=last_at - arrived_at)


def find_logs(folder: Path) -> list[VllmLog]:
    """The runs in a folder, or the one that it is. Raises BadTrace."""
    found = [folder] if (folder / "meta.json").is_file() else sorted(folder.glob("*/"))
    logs = [read_log(one) for one in found if (one / "meta.json").is_file()]
    if not logs:
        raise BadTrace(
            f"{folder} holds no logged runs of vLLM",
            hint="a run is a folder with meta.json, config.json and requests.jsonl",
        )
    return logs


def read_log(folder: Path) -> VllmLog:
    """Raises BadTrace that names the file and what is wrong with it."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        hardware = str(config["nodes"][0]["instances"][0]["hardware"])
        engine = meta["engine_kwargs"]
        log = VllmLog(
            folder=folder,
            name=folder.name,
            version=str(meta["vllm_version"]),
            model=str(meta["model"]),
            hardware=hardware,
            tp=int(engine["tensor_parallel_size"]),
            max_jobs=int(engine["max_num_seqs"]),
            max_tokens=int(engine["max_num_batched_tokens"]),
            num_blocks=meta.get("kv_cache", {}).get("num_gpu_blocks"),
            requests=_requests(rows),
        )
    except FileNotFoundError as error:
        raise BadTrace(f"a logged run needs {error.filename}, which is not there") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
        raise BadTrace(f"{folder} is no logged run of vLLM ({told})") from None
    if hardware not in CARDS:
        known = ", ".join(CARDS)
        raise BadTrace(f"{folder}: no card is known as {hardware!r}; known: {known}")
    return log


def _requests(rows: list[dict[str, float | str]]) -> tuple[Logged, ...]:
    if not rows:
        raise ValueError("requests.jsonl is empty")
    rows.sort(key=lambda row: float(row["arrival_time"]))
    began_at = float(rows[0]["arrival_time"])
    apart = min(float(row["queued_ts"]) - float(row["arrival_time"]) for row in rows)
    return tuple(_logged(row, began_at, apart) for row in rows)


def _logged(row: dict[str, float | str], began_at: float, apart: float) -> Logged:
    arrived_at, num_output = float(row["arrival_time"]), int(row["output_toks"])
    first_at, last_at = float(row["first_token_ts"]), float(row["last_token_ts"])
    return Logged(
        id=str(row["request_id"]),
        at=arrived_at - began_at,
        num_prompt=int(row["input_toks"]),
        num_output=num_output,
        real=latency_of(arrived_at + apart, first_at, last_at, num_output),
        is_queued=float(row["scheduled_ts"]) - float(row["queued_ts"]) >= NOT_QUEUED_S,
    )
