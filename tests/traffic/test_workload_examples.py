"""What the documentation shows of workloads can be played."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from penstock.traffic import open_trace
from penstock.traffic.arrivals import KINDS as ARRIVALS
from penstock.traffic.draws import KINDS as DRAWS
from penstock.traffic.lengths import KINDS as LENGTHS
from tests.traffic.written_workloads import requests_of, workload

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "workloads.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/workload*.toml")), ids=lambda p: p.stem)
def test_examples(path: Path) -> None:
    trace = open_trace(path, limit=400)
    assert len(requests_of(trace)) >= 400
    assert {request.tenant for request in requests_of(trace)} > {"agents", "tenant-1"}


def test_the_workload_of_the_documentation(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", DOC, re.DOTALL)
    assert len(requests_of(open_trace(workload(tmp_path, text)))) > 1500


def test_the_documentation_names_every_kind() -> None:
    told = set(re.findall(r"`(\w+)`", DOC))
    assert set(ARRIVALS) | set(LENGTHS) | set(DRAWS) <= told
