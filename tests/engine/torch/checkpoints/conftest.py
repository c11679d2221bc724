"""Folders that stand for GGUF files are made in a place of the test's own; compiled kernels stay where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.engine.torch.checkpoints.gguf import folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "cache_folder", lambda part: tmp_path / "cache" / part)
