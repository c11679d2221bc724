"""The page in a real browser: every chart is drawn, in both colour schemes, and nothing complains. Needs Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from penstock.report.collect import Collector
from penstock.report.compose import compose
from penstock.report.html import render
from penstock.report.words import Context
from tests.report.events import played

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"
)
pytest.importorskip("plotly", reason="the extra lab is not installed")

LIGHT, DARK = "1", "0"
NUM_CHARTS = 4
INK = {
    "light": "rgb(86, 93, 107)",
    "dark": "rgb(165, 172, 185)",
}  # of ticks, from the style's variables
# What a reader does: looks, chooses the other scheme, sorts the slowest answers by their third column.
CLICKS = """<script>
window.addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  root.dataset.before = root.dataset.scheme;
  root.dataset.tick = getComputedStyle(document.querySelector(".xtick text")).fill;
  document.getElementById("scheme").click();
  document.querySelectorAll("table")[0].querySelectorAll("th")[2].click();
}, 500));
</script>"""


@pytest.fixture(scope="module")
def text() -> str:
    asks = [(0.02 * i, 20 + i, 5 + i) for i in range(40)]
    page = compose(
        [Collector("run").read(played(asks, num_blocks=60, max_jobs=6)).facts()], Context()
    )
    return render(page)


def opened(text: str, folder: Path, scheme: str) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what the console said."""
    path = folder / "report.html"
    path.write_text(text)
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
        f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1280,2000", "--virtual-time-budget=4000",
        "--enable-logging=stderr", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def root_of(document: str) -> str:
    found = re.search(r"<html[^>]*>", document)
    assert found is not None
    return found[0]


def test_every_chart_is_drawn_in_a_dark_page(text: str, tmp_path: Path) -> None:
    document, console = opened(text, tmp_path, DARK)
    assert console == []
    assert 'data-scheme="dark"' in root_of(document)
    assert f'data-drawn="{NUM_CHARTS}"' in root_of(document)
    assert document.count('class="main-svg"') >= NUM_CHARTS
    assert f"fill: {INK['dark']}" in document


def test_the_button_changes_a_light_page_and_a_click_sorts(text: str, tmp_path: Path) -> None:
    document, console = opened(text.replace("</body>", f"{CLICKS}</body>"), tmp_path, LIGHT)
    assert console == []
    root = root_of(document)
    assert f'data-before="light" data-tick="{INK["light"]}"' in root
    assert f'data-scheme="dark" data-drawn="{NUM_CHARTS}"' in root
    assert f"fill: {INK['dark']}" in document and f"fill: {INK['light']}" not in document
    table = document[document.index("<table") : document.index("</table>")]
    assert 'aria-sort="descending"' in table
    rows = [re.findall(r'data-key="([^"]+)"', row) for row in table.split("<tr>")[2:]]
    column = [float(row[0]) for row in rows]
    assert len(column) == 20 and column == sorted(column, reverse=True)
