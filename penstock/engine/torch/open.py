"""The way in: from a model's name to a running executor.

    executor = open_executor("default")
    executor = open_executor("/models/Qwen3-0.6B", EngineConfig(device="cuda", dtype="bf16"))
    replica_config = ReplicaConfig(num_blocks=executor.num_blocks, block_size=executor.block_size)

Blocks while it looks up, downloads and loads: call it before the loop serves anybody. `stop` the executor when done.
"""

from __future__ import annotations

from dataclasses import replace

from penstock.core.errors import BadConfig, BadModel
from penstock.core.types import CanvasRule
from penstock.engine.folder import ModelFacts, model_facts
from penstock.engine.torch.build import EngineConfig, build_decoder, choose_device
from penstock.engine.torch.cores import MOST_LANES, cores_here, describe
from penstock.engine.torch.crew import TorchCrew
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.diffusion.executor import DiffusionExecutor
from penstock.engine.torch.diffusion.open import open_diffusion
from penstock.engine.torch.drafts.open import beside, draft_facts, open_draft_model
from penstock.engine.torch.elastic.open import check_spread, spread_experts
from penstock.engine.torch.encoders.executor import EncoderExecutor
from penstock.engine.torch.encoders.open import open_encoder
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.hub import find_model

__all__ = ["EngineConfig", "open_executor", "open_leaf"]


def open_executor(model: str, config: EngineConfig | None = None) -> TorchExecutor:
    """Load `model` (a folder, "default", or a Hub name). Raises BadModel, BadConfig."""
    executor = open_leaf(model, config)
    if not isinstance(executor, TorchExecutor):
        kind = "an encoder" if executor.facts.encoder else "a diffusion language model"
        raise BadModel(f"{model} is {kind}: open_leaf opens it")
    return executor


def open_leaf(
    model: str, config: EngineConfig | None = None, rule: CanvasRule | None = None
) -> TorchExecutor | DiffusionExecutor | EncoderExecutor:
    """As open_executor, whichever way the model writes, or reads; `rule` is how one fills canvases."""
    config = config or EngineConfig()
    folder = find_model(
        model,
        endpoint=config.endpoint,
        cache_dir=config.cache_dir,
        revision=config.revision,
        is_offline=config.is_offline,
    )
    facts = model_facts(folder)
    config, why_one_lane = _with_lanes(config, facts)
    config = check_spread(facts, _with_adapters(config, facts))
    if config.speculation is not None and (facts.canvas or facts.encoder) is not None:
        raise BadConfig(f"{model} does not write token by token", hint="leave speculation out")
    if facts.encoder is not None:
        return open_encoder(facts, config)
    if facts.canvas is not None:
        opened, num_blocks = open_diffusion(facts, config)
        return DiffusionExecutor(opened, num_blocks, facts, config, rule or CanvasRule())
    if (config.host_blocks or config.tiers.host_bytes) and config.tensor_parallel > 1:
        raise BadConfig(
            "nothing can be moved to host memory when a model is split over several processes",
            hint="leave out cache.swap.host_blocks and cache.tiers, or use one process",
        )
    if config.tensor_parallel > 1:
        draft_facts(config, facts)  # which refuses a model that would guess here
        crew, built = TorchCrew.hire(facts, config)
        return TorchExecutor(built, facts, config, crew)
    draft = draft_facts(config, facts)
    if draft is not None:
        config = beside(config, facts, draft)
    built = build_decoder(facts, config, Alone(), None)
    if config.lanes > 1:
        built.notes["lanes"] = describe(cores_here(config.threads))
    elif why_one_lane is not None:
        built.notes["lanes"] = f"1: {why_one_lane}"
    if config.expert_devices is not None:
        built.changes = spread_experts(facts, config, built)
    executor = TorchExecutor(built, facts, config)
    if draft is not None:
        executor.drafter = open_draft_model(draft, config, built.num_blocks)
    return executor


def _with_adapters(config: EngineConfig, facts: ModelFacts) -> EngineConfig:
    """The same without room for adapters where there can be none. Raises BadConfig when some are named."""
    reason = None
    if config.tensor_parallel > 1:
        reason = "a model that is split over several processes"
    elif facts.canvas is not None:
        reason = "a diffusion language model"
    elif facts.encoder is not None:
        reason = "an encoder"
    if reason is None:
        return config
    if config.adapters:
        raise BadConfig(f"{reason} takes no adapters", hint="leave the fleet's adapters out")
    return replace(config, max_adapters=0)


def _with_lanes(config: EngineConfig, facts: ModelFacts) -> tuple[EngineConfig, str | None]:
    """The same with as many lanes as there can be, and why there are fewer. Raises BadConfig when they are a must."""
    reason = None
    if config.lanes == 1:
        return config, None
    if config.lanes > MOST_LANES:
        reason = f"the torch executor runs at most {MOST_LANES} plans side by side"
    elif config.tensor_parallel > 1:
        reason = "a model that is split over several processes runs one plan at a time"
    elif facts.canvas is not None:
        reason = "a diffusion language model runs one plan at a time"
    elif facts.encoder is not None:
        reason = "an encoder runs one plan at a time"
    elif choose_device(config.device).type != "cpu":
        reason = "only on a CPU can lanes be given shares of the device"
    if reason is None:
        return config, None
    if config.must_have_lanes:
        raise BadConfig(reason, hint='leave `lanes` out, or model it: kind = "modelled"')
    return replace(config, lanes=1), reason
