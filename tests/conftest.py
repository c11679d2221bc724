"""Where the published data lies for tests that use it: --penstock-data or PENSTOCK_DATA. Without it they skip.

Examples of hypothesis may take as long as they like: a busy machine stretches one beyond any bound, which says nothing
of the code. Slow tests that do not say how long they may take get SLOW_S: the first one that starts an engine waits
until its kernels are compiled.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Tests put other things in the place of functions and fields, which compiled modules do not allow.
os.environ.setdefault("PENSTOCK_COMPILED", "off")


SLOW_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_S))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--penstock-data",
        default=os.environ.get("PENSTOCK_DATA"),
        help="folder with traces/, vllm_logs/ and op_tables/ as their publishers give them",
    )


@pytest.fixture(scope="session")
def penstock_data(request: pytest.FixtureRequest) -> Path:
    """The folder of published data."""
    given = request.config.getoption("--penstock-data")
    if not given:
        pytest.skip("needs the published data: set PENSTOCK_DATA or --penstock-data to its folder")
    folder = Path(given)
    if not folder.is_dir():
        pytest.fail(f"--penstock-data {folder} is no folder")
    return folder
