"""Tensors of a model folder, read one at a time, whole or as one rank's slice.

Nothing is loaded ahead: each tensor is read when the layer that needs it is packed, so the peak beyond the packed
model is one layer. Every way in which a file can be broken ends in a BadModel that names the file and the tensor. So
does a tensor of a layer that nobody asked for: the model would not be the one that was trained. Tensors elsewhere
(a vision tower, layers beyond the last) are left where they are; `unread` says which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penstock.core.errors import BadModel
from penstock.engine.folder import read_json
from penstock.engine.torch.ports import ShardSpec

INDEX = "model.safetensors.index.json"
PREFIXES = ("", "model.", "language_model.model.", "model.language_model.")
NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEFT_OVER = ("rotary_emb.inv_freq",)  # old checkpoints hold what is computed here
AGAIN = "the download or copy was cut short: fetch the file again"


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def __getitem__(self, at: tuple[slice, ...]) -> Tensor: ...


class _Opened(Protocol):
    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...


class WeightFolder:
    """The safetensors files of one folder. `get` reads one tensor in the wanted dtype, on the wanted device."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self.rank, self.world = rank, world
        self._opened: dict[Path, _Opened] = {}
        self._file_of = self._find()
        self._asked: set[str] = set()
        there = [one for one in PREFIXES if f"{one}embed_tokens.weight" in self._file_of]
        self.prefix = there[0] if there else "model."

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(
        self,
        name: str,
        shape: Sequence[int],
        shard: ShardSpec | None = None,
        rows: range | None = None,
    ) -> Tensor:
        """This rank's part of tensor `name`, whose whole shape must be `shape`, or of some `rows`. Raises BadModel."""
        self._asked.add(name)
        path = self._file_of.get(name)
        if path is None:
            raise BadModel(
                f"{self.folder} has no tensor {name!r}",
                hint="config.json and the safetensors files must come from the same checkpoint",
            )
        try:
            view = self._open(path).get_slice(name)
            found = tuple(view.get_shape())
            if found != tuple(shape):
                raise BadModel(
                    f"{path}: tensor {name!r} has shape {list(found)}, config.json asks for {list(shape)}",
                    hint="config.json and the safetensors files must come from the same checkpoint",
                )
            tensor = view[_part(found, shard, rows)]
        except (SafetensorError, OSError) as error:
            raise BadModel(f"{path}: tensor {name!r} cannot be read: {error}", hint=AGAIN) from None
        if tensor.dtype not in NUMBERS:
            raise BadModel(
                f"{path}: tensor {name!r} is {tensor.dtype}, not a floating-point number of 16 bits or more",
                hint="quantised checkpoints are not supported",
            )
        return tensor.to(device=self.device, dtype=self.dtype).contiguous()

    def check_layers(self, count: int) -> None:
        """Raises BadModel when a tensor of one of the first `count` layers was not asked for."""
        heads = tuple(f"{self.prefix}layers.{layer}." for layer in range(count))
        for name in self._file_of:
            if name in self._asked or not name.startswith(heads) or name.endswith(LEFT_OVER):
                continue
            raise BadModel(
                f"{self._file_of[name]}: tensor {name!r} has no place in the model of config.json",
                hint="config.json and the safetensors files must come from the same checkpoint",
            )

    def unread(self) -> list[str]:
        """Groups of tensors that nobody asked for, with their numbers."""
        left: Counter[str] = Counter()
        for name in self._file_of.keys() - self._asked:
            if not name.endswith(LEFT_OVER):
                left[".".join(_group(name.split(".")))] += 1
        return [f"{group} ({count})" for group, count in sorted(left.items())]

    def close(self) -> None:
        self._opened.clear()

    def _find(self) -> dict[str, Path]:
        index = self.folder / INDEX
        if index.exists():
            return self._indexed(index)
        single = self.folder / "model.safetensors"
        paths = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise BadModel(
                f"{self.folder} holds no *.safetensors file", hint=_what_instead(self.folder)
            )
        return {name: path for path in paths for name in self._open(path).keys()}  # noqa: SIM118

    def _indexed(self, index: Path) -> dict[str, Path]:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise BadModel(f"{index} has no weight_map", hint="download the index file again")
        files = {name: self.folder / str(file) for name, file in names.items()}
        for path in sorted(set(files.values())):
            if not path.exists():
                raise BadModel(
                    f"{path} is missing; {index.name} lists it", hint="download that file"
                )
        return files

    def _open(self, path: Path) -> _Opened:
        known = self._opened.get(path)
        if known is None:
            try:
                opened = safe_open(str(path), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise BadModel(
                    f"{path} is not a whole safetensors file: {error}", hint=_why_broken(path)
                ) from None
            known = self._opened[path] = cast(_Opened, opened)
        return known


def _part(shape: tuple[int, ...], shard: ShardSpec | None, rows: range | None) -> tuple[slice, ...]:
    parts = [range(size) for size in shape]
    if rows is not None:
        parts[0] = rows
    if shard is not None and shard.dim != "none":
        axis = 0 if shard.dim == "out" else 1
        each = len(parts[axis]) // shard.world
        parts[axis] = parts[axis][shard.rank * each : (shard.rank + 1) * each]
    return tuple(slice(part.start, part.stop) for part in parts)


def _group(words: list[str]) -> list[str]:
    """The beginning of a name: as far as the first number, at most three words."""
    for at, word in enumerate(words[:3]):
        if word.isdigit():
            return words[: at + 1]
    return words[: min(3, len(words) - 1)] or words


def _why_broken(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer: run `git lfs pull` in the folder"
    return AGAIN


def _what_instead(folder: Path) -> str:
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        return "only safetensors are read; save the model again with safe_serialization"
    if list(folder.glob("*.gguf")):
        return "GGUF files are not read; use the safetensors checkpoint of the same model"
    return "give a folder that holds config.json and *.safetensors"
