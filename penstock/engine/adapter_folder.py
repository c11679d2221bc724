"""What a LoRA adapter's folder says about itself, read from PEFT's adapter_config.json: no torch, no weights.

An adapter changes some linear layers of a model: y = W x + s B (A x), with A [r, in] and B [out, r]. The file says r
and s = alpha / r (alpha / sqrt(r) of rank-stabilised ones), for all layers or by patterns of names, and which layers
are meant: by the ends of their names, by one pattern over whole names, or "all-linear". Everything that would change
the answer and is not served is refused by name.

An adapter is told apart by `adapter_key`, its name and a digest of its files: what is loaded under an old name with
other contents is another adapter, and finds nothing that the old one left in the prefix cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.core.errors import BadModel
from penstock.engine.folder import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIGEST_BYTES = 6
ALL_LINEAR = "all-linear"
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # ways to begin that alter the base's weights
HARMLESS: dict[str, tuple[object, ...]] = {  # what is not served, unless it holds one of these
    "use_dora": (None, False),
    "modules_to_save": (None, []),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
}
Number = int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """`ranks` and `alphas`: by pattern of a layer's name, where they differ from `rank` and `alpha`.

    `targets` None: every linear layer but the head. `layers` None: of all decoder layers.
    """

    folder: Path
    rank: int
    alpha: float
    targets: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    layers: tuple[int, ...] | None = None
    is_rank_stabilised: bool = False

    @property
    def most_ranks(self) -> int:
        return max(self.rank, *(rank for _, rank in self.ranks), 1)

    def rank_of(self, module: str) -> int:
        return next((rank for name, rank in self.ranks if _is_meant(name, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """What B (A x) of this layer is multiplied by."""
        alpha = next((alpha for name, alpha in self.alphas if _is_meant(name, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (rank**0.5 if self.is_rank_stabilised else rank)

    def is_target(self, module: str, layer: int) -> bool:
        """Whether a layer of this whole name, in decoder layer `layer`, is changed."""
        if self.layers is not None and layer not in self.layers:
            return False
        if self.excluded and _is_named(self.excluded, module):
            return False
        return self.targets is None or _is_named(self.targets, module)


def adapter_facts(folder: Path) -> AdapterFacts:
    """Raises BadModel for what is missing, malformed or not served."""
    if not folder.is_dir():
        raise BadModel(
            f"there is no adapter folder {folder}",
            hint=f"give a folder that holds {CONFIG} and {WEIGHTS}",
        )
    path = folder / CONFIG
    told = read_json(path)
    _refuse_others(told, path)
    if not (folder / WEIGHTS).is_file():
        raise BadModel(
            f"{folder} has no {WEIGHTS}",
            hint="only safetensors are read: save the adapter again with safe_serialization",
        )
    return AdapterFacts(
        folder=folder,
        rank=_rank(told.get("r", 8), "r", path),
        alpha=_alpha(told.get("lora_alpha", 8), "lora_alpha", path),
        targets=_targets(told.get("target_modules"), path),
        excluded=_names(told.get("exclude_modules"), "exclude_modules", path),
        ranks=tuple(
            (name, _rank(value, f"rank_pattern.{name}", path))
            for name, value in _patterns(told, "rank_pattern", path)
        ),
        alphas=tuple(
            (name, _alpha(value, f"alpha_pattern.{name}", path))
            for name, value in _patterns(told, "alpha_pattern", path)
        ),
        layers=_layers(told.get("layers_to_transform"), path),
        is_rank_stabilised=told.get("use_rslora") is True,
    )


def adapter_key(name: str, folder: Path) -> str:
    """What requests and hashes of blocks call this adapter. Raises BadModel when a file cannot be read."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for file in (CONFIG, WEIGHTS):
        try:
            with (folder / file).open("rb") as opened:
                while part := opened.read(1 << 20):
                    digest.update(part)
        except OSError as error:
            raise BadModel(f"{folder / file} cannot be read: {error.strerror or error}") from None
        digest.update(b"\0")
    return f"{name}@{digest.hexdigest()}"


def name_of(key: str) -> str:
    """What callers call an adapter of this key."""
    return key.rpartition("@")[0] or key


def _refuse_others(told: Mapping[str, object], path: Path) -> None:
    kind = told.get("peft_type", "LORA")
    if kind != "LORA":
        raise BadModel(f"{path}: peft_type is {kind!r}", hint="only LoRA adapters are served")
    for key, harmless in HARMLESS.items():
        if told.get(key) not in harmless:
            raise BadModel(
                f"{path}: {key} = {told[key]!r} is not supported",
                hint="plain LoRA of linear layers is served; merge this adapter into its model instead",
            )
    begun = str(told.get("init_lora_weights", "")).lower()
    if begun.startswith(CHANGES_BASE):
        raise BadModel(
            f"{path}: init_lora_weights = {begun!r} goes with a base model whose weights were changed",
            hint="save the adapter with path_initial_model_for_weight_conversion, which makes it a plain one",
        )


def _rank(value: object, key: str, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadModel(f"{path}: {key} must be a positive integer, got {value!r}")
    return value


def _alpha(value: object, key: str, path: Path) -> float:
    if not isinstance(value, Number) or isinstance(value, bool):
        raise BadModel(f"{path}: {key} must be a number, got {value!r}")
    return float(value)


def _targets(value: object, path: Path) -> str | tuple[str, ...] | None:
    if not value:
        raise BadModel(
            f"{path}: target_modules is empty",
            hint="it lists the layers that are changed; PEFT fills it in when it saves",
        )
    if isinstance(value, str) and value.lower() == ALL_LINEAR:
        return None
    return _names(value, "target_modules", path)


def _names(value: object, key: str, path: Path) -> str | tuple[str, ...]:
    """A pattern, or the ends of names."""
    if isinstance(value, str):
        return _checked(value, key, path)
    if value is None:
        return ()
    if not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise BadModel(f"{path}: {key} must be a pattern or a list of names, got {value!r}")
    return tuple(value)


def _checked(pattern: str, key: str, path: Path) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise BadModel(f"{path}: {key} is no regular expression: {error}") from None
    return pattern


def _patterns(told: Mapping[str, object], key: str, path: Path) -> list[tuple[str, object]]:
    value = told.get(key) or {}
    if not isinstance(value, Mapping):
        raise BadModel(f"{path}: {key} must be a table, got {value!r}")
    return [(_checked(str(name), key, path), one) for name, one in value.items()]


def _layers(value: object, path: Path) -> tuple[int, ...] | None:
    if value is None:
        return None
    found = (value,) if isinstance(value, int) else value
    if not isinstance(found, Sequence) or not all(isinstance(one, int) for one in found):
        raise BadModel(f"{path}: layers_to_transform must list numbers of layers, got {value!r}")
    return tuple(found)


def _is_named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_meant(pattern: str, module: str) -> bool:
    """Whether a pattern is the whole name of a layer, or the end of it from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
