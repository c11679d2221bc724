"""From a decoder without experts to one whose experts are spread over device processes."""

from __future__ import annotations

from dataclasses import replace

import torch

from penstock.core.errors import BadConfig
from penstock.engine.folder import ModelFacts
from penstock.engine.torch.build import Built, EngineConfig, methods_of
from penstock.engine.torch.crew import told_of
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.elastic.change import Changes
from penstock.engine.torch.elastic.exchange import Form
from penstock.engine.torch.elastic.pages import Packed, can_share
from penstock.engine.torch.elastic.spread import Spread, Wanted
from penstock.engine.torch.elastic.workers import Standbys
from penstock.engine.torch.load import Packer
from penstock.engine.torch.load_mixture import load_expert
from penstock.engine.torch.mlp import Mixture
from penstock.engine.torch.ports import DTYPES
from penstock.engine.torch.weights import WeightFolder
from penstock.policy.move.elastic_moe import ElasticMoe


def check_spread(facts: ModelFacts, config: EngineConfig) -> EngineConfig:
    """The same with what spread experts need. Raises BadConfig where there can be none."""
    if config.expert_devices is None:
        return config
    reason = None
    if facts.canvas is not None or facts.encoder is not None or facts.shape.experts is None:
        reason = "this model has no experts"
    elif config.tensor_parallel > 1:
        reason = "experts are spread, or split over tensor_parallel processes, not both"
    elif config.device not in ("auto", "cpu"):
        reason = "experts are spread over processes of a CPU only"
    elif not can_share():
        reason = "experts are spread in shared memory of Linux"
    elif config.expert_devices > facts.shape.experts.count:
        reason = f"{facts.shape.experts.count} experts cannot be spread over more devices than that"
    if reason is not None:
        raise BadConfig(reason, hint="leave executor.expert_devices out")
    return replace(config, device="cpu")


def spread_experts(facts: ModelFacts, config: EngineConfig, built: Built) -> Changes:
    """Start the device processes and have them read their experts. Raises BadConfig, BadModel, StepFailed."""
    mixtures = [layer.mlp for layer in built.decoder.layers if isinstance(layer.mlp, Mixture)]
    mixed, devices = facts.shape.experts, config.expert_devices
    assert mixed is not None and devices is not None
    dtype = next(name for name, each in DTYPES.items() if each == built.dtype)
    told = {"folder": str(facts.folder), "config": told_of(config), "dtype": dtype}
    standbys = Standbys(told, config.expert_standby)
    standbys.start(devices)
    layers = tuple(each.layer for each in mixtures)
    try:
        wanted = Wanted(
            layers=layers,
            num_experts=mixed.count,
            page_bytes=_page_bytes(facts, config, built, layers),
            form=Form(facts.shape.hidden, mixed.top_k, str(built.dtype).removeprefix("torch.")),
            threads=config.threads or torch.get_num_threads(),
        )
        spread = Spread(wanted, standbys)
    except BaseException:
        standbys.close()
        raise
    changes = Changes(spread)
    try:
        changes.reshape(devices, ElasticMoe(), {})
    except BaseException:
        spread.close()
        raise
    for mixture in mixtures:
        mixture.spread = spread
    built.notes["experts"] = f"{devices} device processes, {config.expert_standby} standby"
    return changes


def _page_bytes(
    facts: ModelFacts, config: EngineConfig, built: Built, layers: tuple[int, ...]
) -> int:
    """Of the largest, from one expert of each layer."""
    methods = methods_of(config, built.device, built.dtype)
    folder = WeightFolder(facts.folder, built.dtype, built.device)
    packer = Packer(folder, built.decoder.shape, methods.layers, Alone(), methods.quantised)
    found = max(Packed(load_expert(packer, layer, 0)).page_bytes for layer in layers)
    folder.close()
    return found
