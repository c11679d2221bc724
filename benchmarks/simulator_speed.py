"""How fast `penstock simulate` is: requests per second of wall and of processor, memory, and the digest of each run.

    python -m benchmarks.simulator_speed --data FOLDER [--requests 1000000 --replicas 100] [--only azure,mooncake,day]
        [--peer NAME=COMMAND ...] [--repeat 1] [--json]

Three cases, each in a fresh process, which may use a second one for its figures (report.account):

    azure     the whole Azure conversation trace (19,366 requests), 4 replicas
    mooncake  the whole Mooncake conversation trace (12,031 requests), 8 replicas, prefix caching
    day       --requests of a day of ServeGen's published clients on --replicas, streamed: rows are drawn while the
              simulation runs and forgotten when they have ended. Without the clients' files (FOLDER/traces/servegen/
              language_m-large, or --servegen) the day is a Gamma process (CV 2) with lognormal lengths, and named so

Replicas are modelled A100-80G with an 8B model under vllm-v1, as in examples/azure_a100.toml. FOLDER holds the
published traces as traces/azure_2023_conv.csv and traces/mooncake_conversation.jsonl; the environment variable
PENSTOCK_DATA names it too. A case whose trace is absent is said to be skipped.

"wall" and "cpu" are of the whole process with its children, from start to end; "run" is what the simulation says it
took, without the start of the interpreter. "rss" is the largest resident set of any of its processes.

Compiled modules are used where there are any (`penstock compile`); PENSTOCK_COMPILED=off measures plain Python. The
last line says which.

A peer is any command that plays the same traces. It is timed in the same way, once for each case that its name begins
with: `--peer "azure dynosim=/venv/bin/python replay.py {trace} --workers {replicas}"`. In COMMAND, {trace}, {replicas}
and {requests} are replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from penstock.core.compiled import is_active

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "azure_a100.toml"
DAY_S = 86_400
SERVEGEN = """num_requests = {requests}

[model]
kind = "servegen"
folder = "{folder}"
duration_s = {day_s}
rate_per_s = {rate_per_s}
"""
PLAIN = """num_requests = {requests}

[arrivals]
kind = "gamma"
rate_per_s = {rate_per_s}
cv = 2.0

[lengths]
kind = "lognormal"
prompt_median = 700
output_median = 180
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trace on so many replicas. `requests`: how many it has at most."""

    name: str
    trace: Path
    replicas: int
    requests: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One process, from start to end. What a peer does not say is None."""

    name: str
    replicas: int
    requests: int
    wall_s: float
    cpu_s: float
    rss_mib: float
    run_s: float | None = None
    num_events: int | None = None
    num_steps: int | None = None
    digest: str | None = None

    @property
    def per_wall_s(self) -> float:
        return self.requests / self.wall_s

    @property
    def per_cpu_s(self) -> float:
        return self.requests / self.cpu_s


def timed(command: list[str]) -> tuple[str, float, float, float]:
    """Run it to its end: what it printed, wall seconds, processor seconds, MiB. Exits when it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, cwd=ROOT)
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{shlex.join(command)} ended with {process.returncode}")
        out.seek(0)
        told = out.read()
    return told, wall_s, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def simulate(case: Case) -> Measured:
    command = [
        sys.executable, "-m", "penstock", "simulate", str(CONFIG), "--trace", str(case.trace),
        "--limit", str(case.requests), "--set", f"fleet.0.replicas={case.replicas}", "--json",
    ]  # fmt: skip
    told, wall_s, cpu_s, rss_mib = timed(command)
    found = json.loads(told)
    return Measured(
        name=case.name,
        replicas=case.replicas,
        requests=found["played"]["num_sent"],
        wall_s=wall_s,
        cpu_s=cpu_s,
        rss_mib=rss_mib,
        run_s=found["wall_s"],
        num_events=found["num_events"],
        num_steps=found["figures"]["num_steps"],
        digest=found["digest"],
    )


def peer(name: str, command: str, case: Case, requests: int) -> Measured:
    words = {"trace": str(case.trace), "replicas": str(case.replicas), "requests": str(requests)}
    _, wall_s, cpu_s, rss_mib = timed([part.format(**words) for part in shlex.split(command)])
    return Measured(
        name=name,
        replicas=case.replicas,
        requests=requests,
        wall_s=wall_s,
        cpu_s=cpu_s,
        rss_mib=rss_mib,
    )


def day(args: argparse.Namespace, folder: Path | None, scratch: Path) -> Case:
    """The workload file of the day, and what to call it."""
    servegen = args.servegen
    if servegen is None and folder is not None:
        servegen = folder / "traces" / "servegen" / "language_m-large"
    has_clients = servegen is not None and servegen.is_dir()
    trace = scratch / ("servegen_day.toml" if has_clients else "gamma_day.toml")
    text = SERVEGEN if has_clients else PLAIN
    words = {"requests": args.requests, "folder": servegen, "day_s": DAY_S}
    trace.write_text(text.format(rate_per_s=args.requests / DAY_S, **words))
    return Case(name=trace.stem, trace=trace, replicas=args.replicas, requests=args.requests)


def cases(args: argparse.Namespace, scratch: Path) -> list[Case]:
    folder = args.data or os.environ.get("PENSTOCK_DATA")
    folder = None if folder is None else Path(folder)
    wanted = args.only.split(",")
    found = []
    for name, file, replicas, requests in (
        ("azure", "azure_2023_conv.csv", 4, 19_366),
        ("mooncake", "mooncake_conversation.jsonl", 8, 12_031),
    ):
        trace = None if folder is None else folder / "traces" / file
        if name not in wanted:
            continue
        if trace is None or not trace.exists():
            print(f"{name} is skipped: no {file} (--data FOLDER)", file=sys.stderr)
            continue
        found.append(Case(name=name, trace=trace, replicas=replicas, requests=requests))
    if "day" in wanted:
        found.append(day(args, folder, scratch))
    return found


def table(rows: list[Measured]) -> str:
    heads = (
        "case", "replicas", "requests", "wall s", "run s", "cpu s", "req/wall s", "req/cpu s", "rss MiB", "steps",
        "digest",
    )  # fmt: skip
    cells = [
        (
            row.name,
            f"{row.replicas}",
            f"{row.requests:,}",
            f"{row.wall_s:.2f}",
            "-" if row.run_s is None else f"{row.run_s:.2f}",
            f"{row.cpu_s:.2f}",
            f"{row.per_wall_s:,.0f}",
            f"{row.per_cpu_s:,.0f}",
            f"{row.rss_mib:.0f}",
            "-" if row.num_steps is None else f"{row.num_steps:,}",
            row.digest or "-",
        )
        for row in rows
    ]
    widths = [max(len(line[place]) for line in (heads, *cells)) for place in range(len(heads))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        for line in (heads, *cells)
    ]
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast `penstock simulate` is.")
    parser.add_argument("--data", type=Path, help="folder with traces/ [PENSTOCK_DATA]")
    parser.add_argument("--servegen", type=Path, help="folder of ServeGen clients")
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the day")
    parser.add_argument("--replicas", type=int, default=100, help="of the day")
    parser.add_argument("--only", default="azure,mooncake,day", help="cases, by comma")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; all are printed")
    parser.add_argument("--peer", action="append", default=[], help='"CASE NAME=COMMAND"')
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[Measured] = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(args, Path(scratch)):
            for _ in range(args.repeat):
                ours = simulate(case)
                rows.append(ours)
                for told in args.peer:
                    name, _, command = told.partition("=")
                    if name.split()[0] in case.name:
                        rows.append(peer(name, command, case, ours.requests))
    if args.json:
        kept = [asdict(row) | {"per_wall_s": row.per_wall_s, "per_cpu_s": row.per_cpu_s} for row in rows]  # fmt: skip
        print(json.dumps({"schema": 1, "runs": kept}, indent=1))
    else:
        print(table(rows))
        print(f"compiled modules: {'yes' if is_active() else 'no'}")


if __name__ == "__main__":
    main()
