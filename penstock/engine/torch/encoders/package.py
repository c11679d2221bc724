"""How sentence-transformers packages a model: which states make the vector, what is done to it, and how texts begin.

    modules.json                         the modules in order: Transformer, Pooling, Dense, Normalize
    1_Pooling/config.json                which states: cls, mean, max, lasttoken ...; several are put side by side
    sentence_bert_config.json            max_seq_length, do_lower_case
    config_sentence_transformers.json    prompts by name, default_prompt_name

A folder without modules.json is pooled as its kind of model mostly is, and its vectors have length one: an encoder by
the mean of all states, a decoder by its last. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from penstock.core.errors import BadModel

Mode = Literal["cls", "max", "mean", "mean_sqrt", "weightedmean", "last"]
MODES: tuple[Mode, ...] = get_args(Mode)  # in the order in which several stand side by side
FLAGS: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
NEWER: dict[str, Mode] = {
    "mean_sqrt_len_tokens": "mean_sqrt",
    "mean_sqrt_len": "mean_sqrt",
    "lasttoken": "last",
}
DENSE = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "Sigmoid": "sigmoid",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A layer behind the pooling; its weights lie in `folder`."""

    folder: Path
    num_in: int
    num_out: int
    has_bias: bool
    activation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """`max_tokens`: longer texts are cut there by sentence-transformers; here they are refused, or cut if asked."""

    modes: tuple[Mode, ...]
    is_normed: bool = True
    dense: tuple[Dense, ...] = ()
    max_tokens: int | None = None
    lowers: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    is_told: bool = False  # by the folder's files

    def width(self, hidden: int) -> int:
        """Numbers of a vector."""
        return self.dense[-1].num_out if self.dense else len(self.modes) * hidden

    def prompt(self, name: str | None) -> str | None:
        """What goes in front of a text; None where there is no prompt of that name."""
        name = name if name is not None else self.default_prompt
        return "" if name is None else self.prompts.get(name)

    def holds(self, max_context: int) -> int:
        return max_context if self.max_tokens is None else min(self.max_tokens, max_context)


def read_package(folder: Path, *, is_encoder: bool) -> Package:
    """From a model folder. Raises BadModel."""
    place = folder / "modules.json"
    if not place.is_file():
        return Package(modes=("mean",) if is_encoder else ("last",))
    modules = _json(place)
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise BadModel(f"{place} must list modules")
    told = _json(folder / "sentence_bert_config.json") or {}
    texts = _json(folder / "config_sentence_transformers.json") or {}
    found: dict[str, Any] = {"modes": None, "is_normed": False, "dense": ()}
    for module in modules:
        _take(found, module, folder, place)
    if found["modes"] is None:
        found["modes"] = ("mean",) if is_encoder else ("last",)
    longest = told.get("max_seq_length")
    prompts = texts.get("prompts") or {}
    name = texts.get("default_prompt_name")
    if name is not None and name not in prompts:
        raise BadModel(f"{folder}: there is no prompt {name!r}, the default of this model")
    return Package(
        **found,
        max_tokens=longest if isinstance(longest, int) and longest > 0 else None,
        lowers=bool(told.get("do_lower_case")),
        prompts={str(key): str(text) for key, text in prompts.items()},
        default_prompt=name,
        is_told=True,
    )


def _take(found: dict[str, Any], module: dict[str, Any], folder: Path, place: Path) -> None:
    kind, path = str(module.get("type")).rpartition(".")[2], str(module.get("path", ""))
    if kind == "Transformer":
        if path:
            raise BadModel(
                f"{place}: the model lies in {path}",
                hint="copy the files of that folder beside modules.json and leave its path empty",
            )
    elif kind == "Pooling":
        found["modes"] = _modes(folder / path / "config.json")
    elif kind == "Normalize":
        found["is_normed"] = True
    elif kind == "Dense" and not found["is_normed"]:
        found["dense"] = (*found["dense"], _dense(folder / path))
    else:
        raise BadModel(
            f"{place}: a module of type {module.get('type')} in this place is not supported",
            hint="supported are Transformer, Pooling, Dense and then Normalize",
        )


def _modes(place: Path) -> tuple[Mode, ...]:
    told = _json(place)
    if not isinstance(told, dict):
        raise BadModel(f"{place} is missing, which says how states are pooled")
    if told.get("include_prompt", True) is False:
        raise BadModel(f"{place}: include_prompt = false is not supported")
    named = told.get("pooling_mode")
    if named is not None:
        listed = [named] if isinstance(named, str) else list(named)
        wanted = [NEWER.get(str(one), str(one)) for one in listed]
    else:
        wanted = [mode for key, mode in FLAGS.items() if told.get(key)]
    strange = [one for one in wanted if one not in MODES]
    if strange or not wanted:
        raise BadModel(f"{place}: pooling {strange or told} is not supported")
    return tuple(mode for mode in MODES if mode in wanted)


def _dense(folder: Path) -> Dense:
    told = _json(folder / "config.json")
    if not isinstance(told, dict):
        raise BadModel(f"{folder / 'config.json'} is missing")
    name = str(told.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = DENSE.get(name.rpartition(".")[2])
    if activation is None:
        raise BadModel(f"{folder / 'config.json'}: activation_function {name} is not supported")
    return Dense(
        folder=folder,
        num_in=int(told["in_features"]),
        num_out=int(told["out_features"]),
        has_bias=bool(told.get("bias", True)),
        activation=activation,
    )


def _json(place: Path) -> Any:
    """None where there is no such file."""
    try:
        return msgspec.json.decode(place.read_bytes())
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, OSError) as error:
        raise BadModel(f"{place} cannot be read: {error}") from None
