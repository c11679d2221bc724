"""An adapter's tensors, checked against its own config and the model: what is left over or missing is an error.

PEFT calls them base_model.model.NAME.lora_A.weight [r, in] and lora_B.weight [out, r], NAME being that of the layer in
the model. Every layer that the config targets and the model has must be there: PEFT would take a missing one for
untrained, which a file that was cut short must not pass for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from penstock.core.errors import BadModel
from penstock.engine.adapter_folder import WEIGHTS, AdapterFacts
from penstock.engine.torch.adapters.bank import Bank, Factors, Part
from penstock.engine.torch.adapters.places import Places

NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<part>.+))"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
Key = tuple[int, str]  # decoder layer, name inside it
Pair = dict[str, Tensor]  # by side


def read_adapter(facts: AdapterFacts, places: Places, most_ranks: int) -> list[dict[str, Factors]]:
    """By decoder layer, by name inside it. Raises BadModel."""
    if facts.most_ranks > most_ranks:
        raise BadModel(
            f"{facts.folder}: the adapter has rank {facts.most_ranks}, this engine holds ranks up to {most_ranks}",
            hint="raise adapter_rank, which all resident adapters take memory for",
        )
    path = facts.folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadModel(
            f"{path} cannot be read: {error}", hint="download or copy the file again"
        ) from None
    modules, pairs = _pairs(tensors, facts)
    found: list[dict[str, Factors]] = []
    for layer in range(len(places.layers)):
        parts = places.parts(layer)
        inside = {}
        for name, (bank, part) in parts.items():
            pair = pairs.pop((layer, name), None)
            module = modules.get((layer, name))
            if pair is not None and module is not None:
                inside[name] = _factors(facts, module, pair, bank, part)
        found.append(inside)
    if pairs:
        _refuse_strange(facts, [modules[key] for key in pairs])
    _check_whole(facts, places, found, modules)
    return found


def _pairs(
    tensors: Mapping[str, Tensor], facts: AdapterFacts
) -> tuple[dict[Key, str], dict[Key, Pair]]:
    """Whole names of the layers there are, and their tensors."""
    modules: dict[Key, str] = {}
    pairs: dict[Key, Pair] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise BadModel(
                f"{facts.folder / WEIGHTS}: tensor {name!r} is not one of a linear layer's LoRA",
                hint="embeddings, heads, biases and magnitudes are not adapted here; merge this adapter instead",
            )
        key = int(match["layer"]), match["part"]
        modules[key] = cast(str, match["module"])
        pairs.setdefault(key, {})[match["side"]] = tensor
    if not pairs:
        raise BadModel(f"{facts.folder / WEIGHTS} holds no tensors")
    return modules, pairs


def _factors(facts: AdapterFacts, module: str, pair: Pair, bank: Bank, part: Part) -> Factors:
    where = f"{facts.folder / WEIGHTS}: {module}"
    layer = int(module.rpartition("layers.")[2].partition(".")[0])
    if not facts.is_target(module, layer):
        raise BadModel(
            f"{where} is not among target_modules",
            hint="adapter_config.json and the weights must come from the same adapter",
        )
    rank = facts.rank_of(module)
    for side, shape in (("A", (rank, bank.width)), ("B", (part.width, rank))):
        got = tuple(pair[side].shape) if side in pair else None
        if got != shape:
            raise BadModel(
                f"{where}: lora_{side} has shape {got and list(got)}, this model and config ask for {list(shape)}",
                hint="the adapter was made for another model, or its files do not belong together",
            )
        if not pair[side].is_floating_point() or pair[side].dtype.itemsize < 2:
            raise BadModel(
                f"{where}: lora_{side} is {pair[side].dtype}, not a number of 16 bits or more"
            )
    return Factors(down=pair["A"], up=(pair["B"].float() * facts.scale_of(module)).T)


def _refuse_strange(facts: AdapterFacts, modules: list[str]) -> None:
    raise BadModel(
        f"{facts.folder / WEIGHTS}: {sorted(modules)[0]} cannot be adapted in this model",
        hint="layers of attention and of MLPs can; routed experts and latent attention cannot. "
        "Is it an adapter of this model?",
    )


def _check_whole(
    facts: AdapterFacts,
    places: Places,
    found: list[dict[str, Factors]],
    modules: Mapping[Key, str],
) -> None:
    """The model's other targeted layers have the names of those that are there, but for the number and the end."""
    any_key = next(iter(modules))
    prefix = modules[any_key].removesuffix(f"layers.{any_key[0]}.{any_key[1]}")
    for layer, inside in enumerate(found):
        for name in places.parts(layer):
            module = f"{prefix}layers.{layer}.{name}"
            if name not in inside and facts.is_target(module, layer):
                raise BadModel(
                    f"{facts.folder / WEIGHTS} has nothing for {module}, which target_modules names",
                    hint="the file was cut short, or belongs to another model: fetch the adapter again",
                )


def as_bank_entries(
    places: Places, found: list[dict[str, Factors]]
) -> list[tuple[Bank, dict[str, Factors]]]:
    """What each bank is to be given."""
    entries = []
    for banks, inside in zip(places.banks, found, strict=True):
        for bank in banks:
            entries.append((bank, {p.name: inside[p.name] for p in bank.parts if p.name in inside}))
    return entries
