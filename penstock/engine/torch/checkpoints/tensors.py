"""The safetensors files of a folder: one, several, or as many as an index lists."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from penstock.core.errors import BadModel
from penstock.engine.folder import read_json
from penstock.engine.torch.checkpoints.hints import AGAIN, SAME
from penstock.engine.torch.checkpoints.stored import Part

INDEX = "model.safetensors.index.json"


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, at: Part) -> Tensor: ...


class _Opened(Protocol):
    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> Tensor: ...


class SafetensorsFiles:
    """A `Stored` of whole tensors. Files are opened when the first of their tensors is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[Path, _Opened] = {}
        self._file_of = self._find()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def where(self) -> Path:
        return self.folder

    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def place(self, name: str) -> Path:
        path = self._file_of.get(name)
        if path is None:
            raise BadModel(f"{self.folder} has no tensor {name!r}", hint=SAME)
        return path

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def kind(self, name: str) -> str:
        """The number format, in safetensors' words: F32, BF16, I8, F8_E4M3 ..."""
        return self._slice(name).get_dtype()

    def is_quantised(self, name: str) -> bool:
        return False

    def read(self, name: str, part: Part, *, as_numbers: bool = False) -> Tensor:
        try:
            return self._slice(name)[part]
        except (SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from None

    def whole(self, name: str) -> Tensor:
        """A small tensor, of any number of dimensions."""
        try:
            return self._open(self.place(name)).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from None

    def said(self) -> str | None:
        return None

    def close(self) -> None:
        self._opened.clear()

    def _slice(self, name: str) -> _Slice:
        path = self.place(name)
        try:
            return self._open(path).get_slice(name)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: Exception) -> BadModel:
        return BadModel(f"{self.place(name)}: tensor {name!r} cannot be read: {error}", hint=AGAIN)

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


def _why_broken(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer: run `git lfs pull` in the folder"
    return AGAIN


def _what_instead(folder: Path) -> str:
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        return "only safetensors and GGUF are read; save the model again with safe_serialization"
    return "give a folder that holds config.json and *.safetensors, or a .gguf file"
