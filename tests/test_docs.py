"""What the pages say is there: configurations load, links lead somewhere, commands have such flags, files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from penstock.__main__ import VERBS
from penstock.assemble import load_config
from tests.verbs.test_flags import FLAGS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
TABLE_OF_A_FLEET = re.compile(r"\[fleet\.")


def words(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code(text: str) -> list[str]:
    """Lines of code: whole ones of blocks, continued ones joined, and what stands between single marks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```|((?:^ {4}.*\n)+)", text, re.MULTILINE | re.DOTALL)
    lines = [line for pair in blocks for line in "".join(pair).replace("\\\n", " ").splitlines()]
    return [*lines, *re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]


@every_page
def test_configurations_load(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(
        re.findall(r"^```toml\n(.*?)^```", words(page), re.MULTILINE | re.DOTALL)
    ):
        if "duration_s" in block:
            continue  # a workload
        file = tmp_path / f"{number}.toml"
        file.write_text(f"[[fleet]]\n{block}" if TABLE_OF_A_FLEET.match(block) else block)
        load_config(file)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", words(page)):
        if "://" in target:
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{target} of {page.name}"
        if anchor:
            assert anchor in anchors(file), f"{target} of {page.name}"


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them, and those that are set by hand."""
    text = words(page)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
    return made | set(re.findall(r'<a id="([^"]+)"', text))


@every_page
def test_commands_have_such_flags(page: Path) -> None:
    for line in code(words(page)):
        verb, _, rest = line.strip().partition("penstock ")[2].partition(" ")
        if not line.strip().startswith("penstock ") or verb not in VERBS:
            continue
        rest = re.split(r"[|;]|&&|  #", rest)[0]
        names = {name for name in FLAGS if name.split()[0] == verb}
        first = rest.split(" ")[0]
        chosen = {f"{verb} {first}"} & names or ({"bench url"} if verb == "bench" else names)
        known = set().union(*(FLAGS[name] for name in chosen)) | {"--help", "--debug"}
        given = set(re.findall(r"(?<!\S)--[a-z][\w-]*", rest))
        assert given <= known, f"{line!r} of {page.name}: no {given - known}"


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    for line in code(words(page)):
        for module in re.findall(r"python -m (benchmarks\.\w+|tests\.[\w.]+)", line):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{module} of {page.name}"
        for path in re.findall(
            r"(?<![\w/.-])((?:tests|benchmarks|examples|data|penstock)/[\w/.-]*\w)", line
        ):
            is_pattern = any(part.isupper() for part in re.split(r"[/.]", path))  # SLOT/NAME.py
            assert is_pattern or (ROOT / path).exists(), f"{path} of {page.name}"
