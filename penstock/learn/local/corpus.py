"""The training text: the sources and docs of the standard library of the Python that is running.

Everything is found through `sysconfig` and `import`, ordered by name, split by a hash of the name, so the same
installation always yields the same documents. The licence of the text is the PSF licence.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".py", ".txt", ".rst", ".md")
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "data"}
)
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
LARGEST = 400_000
HELD_OUT_ONE_IN = 25
TESTS_ONE_IN = 16


@dataclass(frozen=True, slots=True)
class Document:
    """One file (or one topic of the built-in documentation); `kind` is code, docs, tests or chat."""

    name: str
    text: str
    kind: str

    @property
    def size(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents to learn from and documents never learned from, both ordered by name."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def bucket(name: str, buckets: int) -> int:
    """A number below `buckets` that depends on the name alone, on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % buckets


def gather(root: Path | None = None) -> Corpus:
    """All documents of the installation (or below `root`), deduplicated and split.

    Files of the test-suite are never held out; one in sixteen of them is learned from, the rest is left out.
    """
    documents = list(_files(root or Path(sysconfig.get_path("stdlib"))))
    if root is None:
        documents.extend(_topics())
    train: list[Document] = []
    held_out: list[Document] = []
    seen: set[str] = set()
    for document in sorted(documents, key=lambda d: d.name):
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        if document.kind == "tests":
            if bucket(document.name, TESTS_ONE_IN) == 0:
                train.append(document)
        elif bucket(document.name, HELD_OUT_ONE_IN) == 0:
            held_out.append(document)
        else:
            train.append(document)
    return Corpus(tuple(train), tuple(held_out))


def _files(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        if path.suffix not in SUFFIXES or folders & SKIPPED_FOLDERS or not path.is_file():
            continue
        if not 0 < path.stat().st_size <= LARGEST:
            continue
        text = _read(path)
        if text is None or _is_table(text):
            continue
        if folders & TEST_FOLDERS:
            kind = "tests"
        else:
            kind = "code" if path.suffix == ".py" else "docs"
        yield Document(relative.as_posix(), text, kind)


def _read(path: Path) -> str | None:
    """The text with Unix line ends, or None where it isn't UTF-8 text."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text.replace("\r\n", "\n").replace("\r", "\n")


def _is_table(text: str) -> bool:
    """True for generated character tables: megabytes of near-identical lines that teach nothing."""
    return "gencodec.py" in text[:2000] or text.count("0x") > len(text) // 60


def _topics() -> Iterator[Document]:
    """The language reference that ships inside `pydoc_data`, one document a topic."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in topics.items():
        yield Document(f"topics/{name}.txt", text, "docs")
