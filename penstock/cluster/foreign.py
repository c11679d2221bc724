"""Foreign servers: how they are reached, what they are called by, and what they say about their load.

Load is read from what a server offers to Prometheus under /metrics, by the names of its makers. Of a server without
such a page a report counts the requests that it holds from here; policies go by the fleet's own count in any case.

    vLLM        vllm:num_requests_running/_waiting, kv_cache_usage_perc, cache_config_info (blocks and their size)
    SGLang      sglang:num_running_reqs, num_queue_reqs, token_usage, max_total_num_tokens (where newer)
    llama.cpp   llamacpp:requests_processing, requests_deferred (where it was started with --metrics)
    TGI         tgi_batch_current_size, tgi_queue_size
    Penstock    penstock:num_requests_running/_waiting

Several engines behind one page (data parallel) are added up.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from penstock.core.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """The `[fleet.remote]` table: servers with OpenAI's API that serve this fleet's model.

    `api_key`: what they are shown; "$NAME" takes it from the environment. `models`: what a server calls the model, by
    URL, where that is not the fleet's name. `probe_s`: how often each is asked how it is; one that does not answer in
    `probe_timeout_s`, `max_failures` times in a row, counts as down and is asked less and less often, up to
    `back_off_s`. `idle_timeout_s`: silence of a server that has a request, before the first byte or between two.
    `block_tokens`: size of the pieces that prompts are compared by. `has_usage` False: streams are not asked for it.
    `tokenizer`: folder with the model's tokenizer and chat template, by which prompts are compared in tokens and in
    blocks of the server's size; `kv_events`: where vLLM tells of its blocks, by URL (its --kv-events-config), say
    {"http://a:8000" = "tcp://a:5557"}; it needs the tokenizer.
    """

    urls: tuple[str, ...] = ()
    api_key: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    probe_s: float = 1.0
    probe_timeout_s: float = 3.0
    max_failures: int = 2
    back_off_s: float = 30.0
    connect_timeout_s: float = 5.0
    idle_timeout_s: float | None = 600.0
    block_tokens: int = 64
    has_usage: bool = True
    tokenizer: Path | None = None
    kv_events: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for url in (*self.urls, *self.models):
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not a URL: write http://host:port")
        if len(set(self.urls)) != len(self.urls):
            raise ValueError("urls names a server twice")
        for table in ("models", "kv_events"):
            strange = [url for url in getattr(self, table) if url not in self.urls]
            if strange:
                raise ValueError(f"{table} names {strange[0]!r}, which urls does not")
        if self.kv_events and self.tokenizer is None:
            raise ValueError("kv_events tell of tokens: say with tokenizer which folder makes them")
        for name in ("probe_s", "probe_timeout_s", "back_off_s", "connect_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be a positive number of seconds, got {getattr(self, name)}"
                )
        if self.idle_timeout_s is not None and not self.idle_timeout_s > 0:
            raise ValueError(f"idle_timeout_s must be positive, got {self.idle_timeout_s}")
        for name in ("max_failures", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def block_size(self, load: Load) -> int:
        """Tokens of a block of a server, in which prompts are compared."""
        told = None if self.tokenizer is None else load.block_size
        return told if told is not None and told > 1 else self.block_tokens

    def key(self) -> str | None:
        """The key itself. Raises BadConfig when the environment lacks it."""
        if self.api_key is None or not self.api_key.startswith("$"):
            return self.api_key
        found = os.environ.get(self.api_key[1:])
        if not found:
            raise BadConfig(
                f"remote.api_key is {self.api_key!r}, and the environment has no such variable"
            )
        return found


@dataclass(frozen=True, slots=True)
class Load:
    """What a server said; None where it said nothing."""

    num_running: int | None = None
    num_waiting: int | None = None
    usage: float | None = None  # of the KV memory, 0 to 1
    num_blocks: int | None = None
    block_size: int | None = None


RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing",
           "tgi_batch_current_size", "penstock:num_requests_running")  # fmt: skip
WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred",
           "tgi_queue_size", "penstock:num_requests_waiting")  # fmt: skip
USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage",
         "llamacpp:kv_cache_usage_ratio", "penstock:kv_cache_usage_perc")  # fmt: skip
CAPACITY = "sglang:max_total_num_tokens"  # in tokens, so blocks of one
BLOCKS = "vllm:cache_config_info"
_WANTED = "|".join(re.escape(name) for name in (*RUNNING, *WAITING, *USAGE, CAPACITY, BLOCKS))
_LINE = re.compile(rf"^({_WANTED})(?:\{{(.*)\}})?[ \t]+(\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def read_load(page: bytes) -> Load:
    """The load told by a page of metrics; of an unknown server, nothing."""
    found: dict[str, list[float]] = {}
    num_blocks = block_size = None
    for name, labels, said in _LINE.findall(page.decode("utf-8", "replace")):
        try:
            value = float(said)
        except ValueError:
            continue
        if math.isfinite(value):
            found.setdefault(name, []).append(value)
        if name == BLOCKS:
            told = dict(_LABEL.findall(labels))
            if told.get("num_gpu_blocks", "").isdecimal():
                num_blocks = (num_blocks or 0) + int(told["num_gpu_blocks"])
            if told.get("block_size", "").isdecimal():
                block_size = int(told["block_size"])
    if CAPACITY in found:
        num_blocks, block_size = int(sum(found[CAPACITY])), 1
    return Load(
        num_running=_total(found, RUNNING),
        num_waiting=_total(found, WAITING),
        usage=_mean(found, USAGE),
        num_blocks=num_blocks,
        block_size=block_size,
    )


def _total(found: dict[str, list[float]], names: tuple[str, ...]) -> int | None:
    told = next((found[name] for name in names if name in found), None)
    return None if told is None else int(sum(told))


def _mean(found: dict[str, list[float]], names: tuple[str, ...]) -> float | None:
    told = next((found[name] for name in names if name in found), None)
    return None if told is None else sum(told) / len(told)
