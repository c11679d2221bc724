"""How soon a first token comes when a prompt's keys and values lie elsewhere, and how fast they come from there.

    python -m benchmarks.tier_speed [--tokens 2048] [--prompts 6] [--json FILE]

Engine processes of this machine with a random Llama (SHAPE of benchmarks.migration_pause, fp32: 16 KiB a token), one
thread each, nothing else under way. Prompts are asked for one token, one after the other:

    computed       nobody has seen it
    device         it was asked for just before
    host           others have pushed it out of the device's memory
    disk           and those out of host memory (the file is read through the page cache: nothing empties that here)
    peer, shared   the other process has it on its device, in memory that both map
    peer, tcp      the same over a socket of this machine
    peer's host    the other process has it in host memory, which is mapped too

Printed: the median time to the first token with the fastest and the slowest, what of the prompt was found, how much
sooner than `computed` it came, and MB/s as the replica counts them: of host and disk from the copy's beginning to its
end, of peers from the moment they are asked, so with all messages, and checksums at both ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.migration_pause import SHAPE
from benchmarks.random_models import save_random_llama
from penstock.assemble import assemble, process_leaves
from penstock.assemble.config import load_config
from penstock.assemble.hash_keys import hash_key_of
from penstock.cluster.fleet import Fleet
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling

BLOCK = 16
BLOCK_BYTES = BLOCK * 8 * 2 * 4 * 64 * 4  # of SHAPE in fp32
BETWEEN_S = 0.3  # what is written behind, and what blocks hold is told
FILLER, WARM = 9000, 9001  # prompts of no row
ROWS = ("device", "host", "disk", "peer, shared", "peer, tcp", "peer's host")


@dataclass
class Row:
    place: str
    ttft_s: list[float]
    found: float  # of the prompt's tokens
    mb_per_s: float | None = None

    @property
    def median_s(self) -> float:
        return statistics.median(self.ttft_s)


class Asker:
    """Asks one deployment for first tokens."""

    def __init__(self, fleet: Fleet, tokens: int, key: bytes) -> None:
        self.fleet, self._tokens, self._key = fleet, tokens, key
        self._count = 0

    async def ask(self, number: int) -> tuple[float, int]:
        """Seconds to the first token, and how many of the prompt's were found."""
        self._count += 1
        told: list[tuple[float, int]] = []

        def hear(output: Output) -> None:
            told.append((time.perf_counter(), output.num_cached))

        ids = [1 + (number * 997 + at * 31 + at * at % 61) % 4000 for at in range(self._tokens)]
        request = Request(
            id=RequestId(f"{self._count}"),
            model="m",
            prompt=TokenPrompt(ids, key=self._key),
            sampling=Sampling(max_tokens=1, temperature=0.0, ignore_eos=True),
        )
        begun_at = time.perf_counter()
        await self.fleet.submit(request, hear)
        await asyncio.sleep(BETWEEN_S)
        return told[0][0] - begun_at, told[-1][1]

    def row(self, place: str, told: Sequence[tuple[float, int]]) -> Row:
        found = statistics.mean(each[1] for each in told) / self._tokens
        return Row(place, [each[0] for each in told], found, self._mb_per_s(place))

    def _mb_per_s(self, place: str) -> float | None:
        told = [
            each
            for report in self.fleet.reports()
            if isinstance(report.brought, tuple)
            for each in report.brought
            if place.startswith(each.place) and each.seconds
        ]
        seconds = sum(each.seconds for each in told)
        return sum(each.num_bytes for each in told) / seconds / 1e6 if seconds else None


async def played(asker: Asker, place: str, numbers: Sequence[int]) -> list[Row]:
    """Two replicas take turns, so an even number of requests lies between two of the same replica."""
    ask = asker.ask
    await ask(WARM)
    await ask(WARM)
    if place in ("host", "disk"):
        for number in numbers:
            await ask(number)
        return [asker.row(place, [await ask(number) for number in numbers])]
    if place == "peer's host":
        for number in numbers:
            await ask(number)
            await ask(FILLER)
        told = []
        for number in numbers[:-2]:  # the last ones are on the device
            await ask(FILLER)
            told.append(await ask(number))
        return [asker.row(place, told)]
    pairs = [(await ask(number), await ask(number)) for number in numbers]
    rows = [asker.row(place, [second for _, second in pairs])]
    if place == "device":
        rows.insert(0, asker.row("computed", [first for first, _ in pairs]))
    return rows


async def measured(model: Path, place: str, tokens: int, num: int, scratch: Path) -> list[Row]:
    """The rows of one deployment."""
    one = -(-tokens // BLOCK) + 2  # blocks of a prompt
    is_peer, has_tiers = place.startswith("peer"), place in ("host", "disk", "peer's host")
    cache: dict[str, object] = {"num_blocks": 2 * one if has_tiers else (num + 3) * one}
    if has_tiers:
        tiers: dict[str, object] = {
            "host_bytes": (2 if place == "disk" else num + 4) * one * BLOCK_BYTES
        }
        if place == "disk":
            tiers |= {"disk_bytes": (num + 4) * one * (BLOCK_BYTES + 8192), "dir": str(scratch)}
        cache["tiers"] = tiers
    if is_peer:
        cache["peers"] = {"timeout_s": 30.0}
    told: dict[str, object] = {
        "name": "m",
        "replicas": 2 if is_peer else 1,
        "cache": cache,
        "policy": {"route": "round-robin", "fetch": "always"},
        "executor": {"threads": 1, "dtype": "fp32"},
    }
    flags = {f"fleet.0.{name}": value for name, value in told.items()}
    flags["net.kv"] = {"kind": "tcp" if place == "peer, tcp" else "auto"}
    config = load_config(model=str(model), flags=flags)
    leaves, _ = process_leaves(config)
    service = await assemble(config, leaves)
    try:
        asker = Asker(service.fleet("m"), tokens, hash_key_of(config))
        return await played(asker, place, range(1, num + 1))
    finally:
        await service.stop()


def shown(rows: Sequence[Row]) -> str:
    computed_s = rows[0].median_s
    lines = [
        "| where | first token, ms | found | sooner | MB/s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{1e3 * min(row.ttft_s):.0f}..{1e3 * max(row.ttft_s):.0f}"
        speed = "" if row.mb_per_s is None else f"{row.mb_per_s:,.0f}"
        lines.append(
            f"| {row.place} | {1e3 * row.median_s:.0f} [{spread}] | {row.found:.0%} "
            f"| {computed_s / row.median_s:.1f}x | {speed} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model, scratch = Path(folder, "m"), Path(folder, "disk")
        model.mkdir()
        save_random_llama(model, SHAPE)
        for place in ROWS:
            rows += asyncio.run(measured(model, place, args.tokens, args.prompts, scratch))
    print(shown(rows))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
