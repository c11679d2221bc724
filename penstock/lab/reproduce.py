"""Runs an experiment and keeps what came out.

    kept = reproduce(experiment, scale, store=Path("results/burstgpt.points.jsonl"))

Runs go over the cores through `run_points`: a stopped run goes on where it was. What is kept is plain JSON that names
all it depends on: versions and the digest of the source, seeds, constants, the traces by their sha256, every row, the
verdict. `docs/systems.md` and the table of systems in the README are made of such files and of nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.core.config import Table, build
from penstock.core.errors import BadConfig, StepFailed
from penstock.core.schema import check_schema
from penstock.core.types import SCHEMA
from penstock.lab.experiment import (
    SEEDS,
    Experiment,
    Row,
    Scale,
    Settings,
    Verdict,
    check_plan,
    unequal_sets,
)
from penstock.lab.points import Point, Result, run_points, versions_here
from penstock.report.files import new_figure, save_figure, write_text


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The result of an experiment, as it is written. `num_unequal`: points whose variants served different requests."""

    schema: int = SCHEMA
    name: str
    system: str
    source: str
    claim: str
    criterion: str
    workload: str
    scale: str
    seeds: tuple[int, ...]
    constants: tuple[tuple[str, str], ...]
    versions: dict[str, str]
    traces: dict[str, str]
    num_runs: int
    num_unequal: int
    cpu_s: float
    verdict: Verdict
    rows: tuple[Table, ...] = ()

    def to_json(self) -> str:
        """Rows one to a line, so that two results can be compared by eye and by diff."""
        table = dataclasses.asdict(self)
        rows = table.pop("rows")
        head = json.dumps(table, indent=1)
        lines = ",\n  ".join(json.dumps(row, sort_keys=True) for row in rows)
        return f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n'


def read_kept(path: Path) -> Kept:
    """Raises BadConfig for a file that is no result, SchemaMismatch for one of another version."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadConfig(f"{path} is no result of an experiment: {error}") from None
    schema = table.get("schema") if isinstance(table, dict) else None
    check_schema(str(path), schema if isinstance(schema, int) else 0)
    return build(Kept, table)


def run_row(
    work: Callable[[Settings, Scale], Mapping[str, object]], scale: Scale, point: Point
) -> dict[str, object]:
    """One run of an experiment; in a process of its own."""
    return {name: _plain(value) for name, value in work(point.settings, scale).items()}


def _plain(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reproduce(
    experiment: Experiment,
    scale: Scale,
    *,
    store: Path | None = None,
    processes: int | None = None,
    on_progress: Callable[[int, int, Result], None] | None = None,
) -> Kept:
    """Run all of it. Raises BadConfig without its data, StepFailed when a run fails."""
    if scale.num_seeds < 1:
        raise BadConfig(f"seeds must be at least 1, got {scale.num_seeds}")
    if scale.is_full and scale.num_seeds < SEEDS:
        raise BadConfig(f"a full run takes at least {SEEDS} seeds, got {scale.num_seeds}")
    traces = {name: _sha256(scale.trace(name)) for name in experiment.traces if scale.data}
    prepared = {} if experiment.prepare is None else dict(experiment.prepare(scale))
    plan = list(experiment.plan(scale, prepared))
    check_plan(experiment, plan, scale)
    results = run_points(
        [Point(settings=settings, seed=_seed(settings), inputs=traces) for settings in plan],
        functools.partial(run_row, experiment.work, scale),
        store=store,
        processes=processes,
        on_progress=on_progress,
    )
    failed = [result for result in results if result.error is not None]
    if failed:
        raise StepFailed(
            f"{len(failed)} of {len(results)} runs failed, the first at {json.dumps(dict(failed[0].point.settings))}: "
            f"{failed[0].error}\n{failed[0].trace}",
            hint="what succeeded is kept: the same command goes on from there",
        )
    rows = [Row(settings=result.point.settings, figures=result.value or {}) for result in results]
    return _kept(experiment, scale, rows, prepared, traces, sum(each.cpu_s for each in results))


def _kept(
    experiment: Experiment,
    scale: Scale,
    rows: Sequence[Row],
    prepared: Settings,
    traces: dict[str, str],
    cpu_s: float,
) -> Kept:
    constants = [*experiment.constants]
    constants += [(f"measured: {name}", str(value)) for name, value in prepared.items()]
    models = sorted({str(row.get("cost_model")) for row in rows if row.get("cost_model")})
    constants += [("step times (SIMULATED)", model) for model in models]
    return Kept(
        name=experiment.name,
        system=experiment.system,
        source=experiment.source,
        claim=experiment.claim,
        criterion=experiment.criterion,
        workload=experiment.workload,
        scale=scale.name,
        seeds=tuple(scale.seeds),
        constants=tuple(constants),
        versions=dict(versions_here()),
        traces=traces,
        num_runs=len(rows),
        num_unequal=len(unequal_sets(rows)),
        cpu_s=round(cpu_s, 1),
        verdict=experiment.judge(rows),
        rows=tuple(Table({**row.settings, **_rounded(row.figures)}) for row in rows),
    )


def _rounded(figures: Mapping[str, object]) -> dict[str, object]:
    """Six digits: more are of no use, and files stay readable."""
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in figures.items()
    }


def _seed(settings: Settings) -> int:
    seed = settings["seed"]
    assert isinstance(seed, int)
    return seed


def _sha256(path: Path) -> str:
    """Of a file, or of the names and digests of a folder's."""
    if path.is_dir():
        told = [f"{each.name} {_sha256(each)}" for each in sorted(path.iterdir()) if each.is_file()]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_of(kept: Kept) -> list[Row]:
    """The rows again, for plots: settings and figures are not told apart any more."""
    return [Row(settings=row, figures=row) for row in kept.rows]


def picture(experiment: Experiment, kept: Kept, path: Path) -> None:
    """Draw the experiment's plot. Raises MissingExtra without matplotlib."""
    assert experiment.draw is not None
    figure = new_figure(10, 4.5)
    experiment.draw(rows_of(kept), figure)
    figure.suptitle(f"{experiment.system} (SIMULATED, {kept.scale})")
    save_figure(figure, path)


ROOT = Path(__file__).resolve().parents[2]
RESULTS, SYSTEMS = ROOT / "docs" / "results", ROOT / "docs" / "systems.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- table of penstock reproduce -->", "<!-- end of the table -->"


def keep(kept: Kept) -> list[Path]:
    """Put a result among those that the repository holds; write docs/systems.md and the README's table anew."""
    if not RESULTS.parent.is_dir():
        raise BadConfig("there is no docs folder to keep results in", hint="run in a checkout")
    path = write_text(RESULTS / f"{kept.name}.json", kept.to_json())
    readme = readme_page(README.read_text(encoding="utf-8"))
    return [path, write_text(SYSTEMS, systems_page()), write_text(README, readme)]


def all_kept() -> list[Kept]:
    """What the repository holds, by name."""
    return [read_kept(path) for path in sorted(RESULTS.glob("*.json"))]


def systems_page() -> str:
    """docs/systems.md as the kept results make it."""
    return page_of(all_kept())


def readme_page(page: str) -> str:
    """The README with its table of systems as the kept results make it."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"the README has no lines {BEGIN!r} and {END!r}"
    return "\n".join([f"{before}{BEGIN}", *verdicts_of(all_kept()), f"{END}{after}"])


def verdicts_of(results: Sequence[Kept]) -> list[str]:
    """A row a verdict, the best first: who got it, by the name before the colon where nobody shares that."""
    short = Counter(kept.system.partition(":")[0] for kept in results)
    rows: dict[str, list[str]] = {"reproduced": [], "in part": [], "not": []}
    for kept in results:
        name = kept.system.partition(":")[0]
        told = name if short[name] == 1 else kept.system
        rows.setdefault(kept.verdict.outcome, []).append(f"[{told}](docs/systems.md#{kept.name})")
    lines = [f"| {outcome} | {'; '.join(names)} |" for outcome, names in rows.items() if names]
    return ["| verdict | claims of |", "|---|---|", *lines]


def page_of(results: Sequence[Kept]) -> str:
    """Markdown: a table of all, then each with its criterion, ratios and constants."""
    head = [
        "# Systems, reproduced or not",
        "",
        "Generated from `docs/results/*.json`, which `penstock reproduce NAME --full --keep` writes; do not edit.",
        "All figures are of simulations with stated constants, never of the hardware they name.",
        "Ratios: mean over seeds [least..greatest].",
        "",
        "| system | claim | ours | verdict |",
        "|---|---|---|---|",
    ]
    for kept in results:
        first = kept.verdict.ratios[0] if kept.verdict.ratios else None
        ours = f"{first.name}: {first}" if first else ""
        head.append(
            f"| [{kept.system}](#{kept.name}) | {kept.claim} | {ours} | **{kept.verdict.outcome}** |"
        )
    return "\n".join([*head, "", *(line for kept in results for line in _section(kept))])


def _section(kept: Kept) -> list[str]:
    made_by = f"Penstock {kept.versions.get('penstock')}, source {kept.versions.get('code')}"
    seeds = ", ".join(map(str, kept.seeds))
    lines = [
        f'<a id="{kept.name}"></a>',
        f"## {kept.system}",
        "",
        f"Source: {kept.source}.",
        "",
        f"- Claim: {kept.claim}",
        f"- Counts as reproduced: {kept.criterion}",
        f"- Workload: {kept.workload}",
        f"- **Verdict: {kept.verdict.outcome}.** {kept.verdict.why}",
        f"- {kept.num_runs} runs, seeds {seeds}; `penstock reproduce {kept.name} --full --keep`, {made_by}",
    ]
    if kept.num_unequal:
        lines.append(f"- Variants served different requests at {kept.num_unequal} points.")
    lines += ["", "| what | ours | published |", "|---|---|---|"]
    lines += [f"| {each.name} | {each} | {each.published or '-'} |" for each in kept.verdict.ratios]
    lines += [
        "",
        "Constants: " + "; ".join(f"{what}: {value}" for what, value in kept.constants) + ".",
        "",
    ]
    return lines
