"""What a model folder says about itself, read from its JSON files alone: no torch, no weights.

The gateway and `assemble` need these facts in processes that never load the model. `model_facts` raises BadModel
with the file at fault; whether the weights themselves are whole is found out when they are loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.core.errors import BadModel
from penstock.engine.torch.checkpoints.gguf.folder import folder_of, gguf_file
from penstock.engine.torch.checkpoints.scheme import read_scheme
from penstock.engine.torch.diffusion.families import Canvassed, is_diffusion, read_canvassed
from penstock.engine.torch.encoders.package import Package, read_package
from penstock.engine.torch.encoders.shape import EncoderShape, is_encoder, read_encoder
from penstock.engine.torch.families import Shape, read_shape

DEFAULT_NAME = "default"
DEFAULT_FOLDER = Path(__file__).parent / "default_model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """`eos_ids`: every token that ends a text. `kv_bytes_per_token` by what the cache holds ("fp32", "bf16", "int8").

    `canvas` None: the model writes from left to right. `encoder` None: it is a decoder. `package` makes vectors.
    """

    folder: Path
    shape: Shape
    eos_ids: tuple[int, ...]
    bos_id: int | None
    kv_bytes_per_token: dict[str, int]
    canvas: Canvassed | None = None
    encoder: EncoderShape | None = None
    package: Package = Package(modes=("last",))  # noqa: RUF009 - frozen

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def max_context(self) -> int:
        return self.shape.max_context

    @property
    def num_layers(self) -> int:
        return self.shape.num_layers


def local_folder(name: str | Path) -> Path | None:
    """The folder a name means without asking anybody: "default", or an existing folder; else None.

    A GGUF file, or a folder with nothing but one, means the folder that stands for it. Raises BadModel.
    """
    if str(name) == DEFAULT_NAME:
        return DEFAULT_FOLDER
    path = Path(name).expanduser()
    file = gguf_file(path)
    if file is not None:
        return folder_of(file)
    return path if path.is_dir() else None


def model_facts(folder: str | Path) -> ModelFacts:
    """Facts of a local model folder. Raises BadModel."""
    place = local_folder(folder)
    if place is None or not place.is_dir():
        raise BadModel(
            f"there is no model folder {folder}",
            hint="give a folder that holds config.json and *.safetensors",
        )
    config = read_json(place / "config.json")
    generation = place / "generation_config.json"
    said = read_json(generation) if generation.exists() else {}
    where = str(place / "config.json")
    read_scheme(config, where)  # which raises where nobody could read the weights
    canvas = read_canvassed(config, where) if is_diffusion(config) else None
    encoder = read_encoder(config, where) if is_encoder(config) else None
    package = read_package(place, is_encoder=encoder is not None)
    if encoder is not None:
        shape = encoder.as_shape()
    else:
        shape = read_shape(config, where) if canvas is None else canvas.shape
    if package.is_told:
        shape = replace(shape, has_head=False, max_context=package.holds(shape.max_context))
    eos = said.get("eos_token_id", config.get("eos_token_id"))
    bos = said.get("bos_token_id", config.get("bos_token_id"))
    return ModelFacts(
        folder=place,
        shape=shape,
        eos_ids=_ids(eos),
        bos_id=bos if isinstance(bos, int) else None,
        kv_bytes_per_token={
            dtype: shape.kv_bytes_per_token(dtype) for dtype in ("fp32", "bf16", "int8")
        },
        canvas=canvas,
        encoder=encoder,
        package=package,
    )


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises BadModel that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadModel(
            f"{path} is missing", hint="is this a Hugging Face model folder? Copy all its files"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadModel(
            f"{path} cannot be read: {error}", hint="download or copy the file again"
        ) from None
    if not isinstance(value, dict):
        raise BadModel(f"{path} must hold a JSON object")
    return value


def _ids(value: object) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, list):
        return tuple(item for item in value if isinstance(item, int))
    return ()
