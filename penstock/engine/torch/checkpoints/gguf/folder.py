"""The folder that stands for a GGUF file: its configuration and tokenizer as the files that every model has.

Made when the file is first met, in the user's cache, under a name that changes with the file. Processes that need only
the tokenizer never see the GGUF. `gguf.json` says where the tensors are; the file itself is neither copied nor changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from penstock.core.cache_folder import cache_folder
from penstock.core.errors import BadModel
from penstock.engine.torch.checkpoints.gguf.config import read_config
from penstock.engine.torch.checkpoints.gguf.format import (
    NUMBERED,
    Header,
    Placed,
    all_parts,
    read_headers,
)
from penstock.engine.torch.checkpoints.gguf.tokenizer import (
    end_ids,
    read_vocabulary,
    settings_json,
    tokenizer_json,
)

POINTER = "gguf.json"
FORM = 1  # of what is written: another number, and it is written anew
SUFFIX = ".gguf"


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only model in a folder without safetensors. Raises BadModel."""
    if path.suffix == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or (path / POINTER).exists() or any(path.glob("*.safetensors")):
        return None
    found = only_one([one.name for one in path.glob(f"*{SUFFIX}")], str(path))
    return None if found is None else path / found


def only_one(names: Sequence[str], where: str) -> str | None:
    """The first file of the only model among file names; None where there is none. Raises BadModel."""
    firsts = []
    for name in sorted(names):
        numbered = NUMBERED.match(name)
        is_first = numbered is None or int(numbered.group(2)) == 1
        if is_first and not Path(name).name.startswith("mmproj"):  # of images, beside a model
            firsts.append(name)
    if len(firsts) > 1:
        raise BadModel(
            f"{where} holds several GGUF files: {', '.join(firsts)}",
            hint="name one: FOLDER/FILE.gguf, or on a hub ORG/REPO:FILE.gguf",
        )
    return firsts[0] if firsts else None


def folder_of(path: Path) -> Path:
    """The folder that stands for a file, made if need be. Raises BadModel."""
    paths = [one.absolute() for one in all_parts(path)]
    stem = NUMBERED.sub(r"\1", paths[0].name).removesuffix(SUFFIX)
    cache, elsewhere = cache_folder("gguf"), f"penstock-{os.getuid()}/gguf"
    for root in (cache, Path(tempfile.gettempdir()) / elsewhere):
        place = root / _key(paths) / stem
        if (place / POINTER).exists():
            return place
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            return _made(paths[0], place)
        except PermissionError:
            continue
    raise BadModel(
        f"no folder for the configuration of {path} can be made in {cache}",
        hint="set XDG_CACHE_HOME to a folder that may be written",
    )


def _key(paths: Sequence[Path]) -> str:
    told = [FORM]
    for path in paths:
        state = path.stat()
        told += [str(path), state.st_size, state.st_mtime_ns]  # type: ignore[list-item]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _made(path: Path, place: Path) -> Path:
    """All at once: whoever looks sees the whole folder or none."""
    header = read_headers(path)
    words = read_vocabulary(header.metadata, path)
    config = read_config(header, lambda name: _numbers(header.tensors[name]), path)
    ends = end_ids(words)
    config |= {
        "bos_token_id": words.token_id("bos"),
        "eos_token_id": ends,
        "dtype": _stored(header),
    }
    files: dict[str, Mapping[str, object]] = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": ends, "bos_token_id": words.token_id("bos")},
        "tokenizer.json": tokenizer_json(words),
        "tokenizer_config.json": settings_json(words),
        POINTER: _pointer(header),
    }
    made = Path(tempfile.mkdtemp(dir=place.parent))
    for name, value in files.items():
        (made / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    try:
        made.rename(place)
    except OSError:  # somebody was faster
        shutil.rmtree(made)
    return place


def _stored(header: Header) -> str:
    """fp32 only where all matrices are."""
    kinds = {one.kind.name for one in header.tensors.values() if len(one.shape) > 1}
    return "float32" if kinds == {"F32"} else "bfloat16"


def _pointer(header: Header) -> dict[str, object]:
    tensors = {
        name: [str(one.path), one.kind.name, list(one.shape), one.first]
        for name, one in header.tensors.items()
    }
    return {"tensors": tensors}


def _numbers(placed: Placed) -> list[float]:
    if placed.kind.name != "F32":
        raise BadModel(f"{placed.path}: factors of positions are {placed.kind.name}, not F32")
    with placed.path.open("rb") as file:
        file.seek(placed.first)
        found: list[float] = np.frombuffer(file.read(placed.num_bytes), np.float32).tolist()
    return found
