"""What a sweep leaves in its folder: `results.parquet`, a row a point and seed, and `report.html`. Extra `lab`.

`points.jsonl` lies beside them: the store from which the same command goes on (see `lab.points`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from penstock.core.errors import BadConfig, missing_extra
from penstock.lab.sweep_rows import Row
from penstock.report.html import write
from penstock.report.sweep_page import sweep_page

STORE, PARQUET, REPORT = "points.jsonl", "results.parquet", "report.html"
NEEDED = ("pyarrow", "plotly")


def check_extra() -> None:
    """Raise MissingExtra now, and not when all points are done."""
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "lab")


def write_parquet(rows: Sequence[Row], path: Path) -> Path:
    """A column for every name that any row has; what a row lacks is null. Columns of mixed types are text."""
    import pyarrow  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, import-not-found, unused-ignore]

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    except OSError as error:
        raise BadConfig(f"cannot write {path}: {error.strerror or error}") from None
    return path


def read_parquet(path: Path) -> list[Row]:
    """The rows again. Raises MissingExtra without pyarrow, BadConfig for what is no Parquet file."""
    try:
        import pyarrow  # type: ignore[import-untyped, import-not-found, unused-ignore]
        import pyarrow.parquet  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ModuleNotFoundError:
        raise missing_extra("pyarrow", "lab") from None
    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise BadConfig(f"{path} cannot be read as the results of a sweep: {error}") from None
    if not rows or "variant" not in rows[0]:
        raise BadConfig(f"{path} holds no results of a sweep")
    return rows


def _column(values: list[object]) -> list[object]:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]  # type: ignore[arg-type]
    if len(kinds) > 1:
        return [None if value is None else str(value) for value in values]
    return values


def write_report(rows: Sequence[Row], path: Path, *, subtitle: str) -> Path:
    """One self-contained page."""
    return write(sweep_page(rows, title="Sweep", subtitle=subtitle), path)
