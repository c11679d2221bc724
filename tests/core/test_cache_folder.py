"""One place for all that can be made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core import compiled
from penstock.core.cache_folder import cache_folder


def test_it_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("profiles") == tmp_path / "penstock" / "profiles"
    assert Path(compiled.root()).parent == tmp_path / "penstock"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("nano") == tmp_path / "home" / ".cache" / "penstock" / "nano"
