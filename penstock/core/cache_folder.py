"""Where that is kept which can be made again: below `~/.cache/penstock`, or XDG_CACHE_HOME where that is set."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(part: str) -> Path:
    """The folder of one kind of things (kernels, profiles, ...), which may not be there yet."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "penstock" / part
