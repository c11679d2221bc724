"""How the engine's process lets its OpenMP threads wait."""

from __future__ import annotations

import pytest

from penstock.cluster.process import SPINS, _environment


def test_they_do_not_spin_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    found = _environment()
    assert (found["OMP_WAIT_POLICY"], found["GOMP_SPINCOUNT"]) == ("passive", SPINS)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    found = _environment()
    assert found["OMP_WAIT_POLICY"] == "active" and "GOMP_SPINCOUNT" not in found
