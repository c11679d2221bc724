"""What a config.json says about how weights were quantised. Imports no torch.

Bits, groups and zero points are not read here: the tensors themselves show them, module by module, and so does which
modules were left as they were. What is read is what the tensors cannot show, and what no reader here understands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from penstock.core.errors import BadModel
from penstock.engine.torch.reading import Config

Method = Literal["gptq", "awq", "compressed", "fp8"]
METHODS: dict[str, Method] = {
    "gptq": "gptq",
    "awq": "awq",
    "compressed-tensors": "compressed",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
}
KEYS = ("quantization_config", "compression_config")
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
READABLE = "GPTQ, AWQ (gemm), compressed-tensors and FP8 checkpoints are read, and GGUF files"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """`zero_offset` is added to stored zero points (GPTQ's first format stores them less one).

    `block`: rows and columns that share a scale, where scales have both.
    """

    method: Method
    zero_offset: int = 0
    block: tuple[int, int] | None = None


def read_scheme(config: Config, where: str) -> Scheme | None:
    """None: the weights are not quantised. Raises BadModel for what cannot be read."""
    told = _told(config)
    if told is None:
        return None
    name = str(told.get("quant_method", "compressed-tensors" if "config_groups" in told else ""))
    method = METHODS.get(name)
    if method is None:
        raise BadModel(
            f"{where}: weights quantised by {name or 'an unnamed method'} cannot be read",
            hint=READABLE,
        )
    if method == "gptq":
        return _gptq(told, where)
    if method == "awq":
        _expect(told, "version", ("gemm", None), where)
    elif method == "compressed":
        return _compressed(told, where)
    return Scheme(method=method, block=_block(told.get("weight_block_size"), where))


def _told(config: Config) -> Config | None:
    inner = config.get("text_config")
    for table in (config, inner if isinstance(inner, Mapping) else {}):
        for key in KEYS:
            told = table.get(key)
            if isinstance(told, Mapping):
                return told
    return None


def _gptq(told: Config, where: str) -> Scheme:
    _expect(told, "bits", (4, 8, None), where)
    _expect(told, "checkpoint_format", ("gptq", "gptq_v2", None), where)
    return Scheme(method="gptq", zero_offset=0 if told.get("checkpoint_format") == "gptq_v2" else 1)


def _compressed(told: Config, where: str) -> Scheme:
    groups = told.get("config_groups")
    listed = (
        [one for one in groups.values() if isinstance(one, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    formats = (*FORMATS, "mixed-precision", None)
    _expect(told, "format", formats, where)
    blocks = []
    for group in listed:
        _expect(group, "format", formats, where)
        weights = group.get("weights")
        if isinstance(weights, Mapping) and weights.get("block_structure") is not None:
            blocks.append(_block(weights["block_structure"], where))
    for key in ("sparsity_config", "transform_config"):
        inner = told.get(key)
        if isinstance(inner, Mapping) and inner and inner.get("format") != "dense":
            raise BadModel(f"{where}: {key} is not supported", hint=READABLE)
    if len(set(blocks)) > 1:
        raise BadModel(f"{where}: blocks of several sizes are not supported", hint=READABLE)
    return Scheme(method="compressed", block=blocks[0] if blocks else None)


def _expect(told: Config, key: str, known: tuple[object, ...], where: str) -> None:
    value = told.get(key)
    value = value.lower() if isinstance(value, str) else value
    if value not in known:
        listed = ", ".join(str(one) for one in known if one is not None)
        raise BadModel(
            f"{where}: {key} {told.get(key)!r} of quantised weights is not supported",
            hint=f"supported are {listed}",
        )


def _block(value: object, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    parts = value.lower().split("x") if isinstance(value, str) else value
    if isinstance(parts, list) and len(parts) == 2 and all(str(one).isdigit() for one in parts):
        rows, columns = int(parts[0]), int(parts[1])
        if rows > 0 and columns > 0:
            return rows, columns
    raise BadModel(f"{where}: {value!r} is no size of blocks")
