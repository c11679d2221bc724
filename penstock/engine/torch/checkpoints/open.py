"""The reader of a model folder, by what is in it."""

from __future__ import annotations

from pathlib import Path

from penstock.engine.folder import read_json
from penstock.engine.torch.checkpoints.gguf.folder import POINTER
from penstock.engine.torch.checkpoints.gguf.tensors import GgufTensors
from penstock.engine.torch.checkpoints.packed import PackedTensors
from penstock.engine.torch.checkpoints.scheme import read_scheme
from penstock.engine.torch.checkpoints.stored import Stored
from penstock.engine.torch.checkpoints.tensors import SafetensorsFiles


def open_stored(folder: Path) -> Stored:
    """Raises BadModel."""
    if (folder / POINTER).exists():
        return GgufTensors(folder)
    told = folder / "config.json"
    scheme = read_scheme(read_json(told), str(told)) if told.exists() else None
    files = SafetensorsFiles(folder)
    return files if scheme is None else PackedTensors(files, scheme)
