"""Files that people are left with: text and pictures, in folders that are made for them.

Every picture is drawn by matplotlib (extra `plot`) without a display. What cannot be written is a BadConfig with the
path and the system's reason.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import BadConfig, missing_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 120


def write_text(path: Path | str, text: str, *, what: str = "") -> Path:
    """Write UTF-8; the path. `what` it is, for the error: "the report"."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritten(path, error, what) from None
    return path


def check_writable(path: Path, what: str) -> None:
    """Before a long run: raise now what would be raised at its end. What stands there is left as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _unwritten(path, error, what) from None


def new_figure(width: float, height: float) -> Figure:
    """An empty picture, inches wide and high. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise missing_extra("matplotlib", "plot") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path | str) -> Path:
    """Write a PNG (or what the suffix says); the path."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no format of pictures
        raise _unwritten(path, error, "the picture") from None
    return path


def _unwritten(path: Path, error: Exception, what: str) -> BadConfig:
    told = getattr(error, "strerror", None) or error
    return BadConfig(f"cannot write {what + ' ' if what else ''}{path}: {told}")
