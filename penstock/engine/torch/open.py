"""The way in: from a model's name to a running executor.

    executor = open_executor("default")
    executor = open_executor("/models/Qwen3-0.6B", EngineConfig(device="cuda", dtype="bf16"))
    replica_config = ReplicaConfig(num_blocks=executor.num_blocks, block_size=executor.block_size)

Blocks while it looks up, downloads and loads: call it before the loop serves anybody. `stop` the executor when done.
"""

from __future__ import annotations

from penstock.core.errors import BadConfig, BadModel
from penstock.core.types import CanvasRule
from penstock.engine.folder import model_facts
from penstock.engine.torch.build import EngineConfig, build_decoder
from penstock.engine.torch.crew import TorchCrew
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.diffusion.executor import DiffusionExecutor
from penstock.engine.torch.diffusion.open import open_diffusion
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.hub import find_model

__all__ = ["EngineConfig", "open_executor", "open_leaf"]


def open_executor(model: str, config: EngineConfig | None = None) -> TorchExecutor:
    """Load `model` (a folder, "default", or a Hub name). Raises BadModel, BadConfig."""
    executor = open_leaf(model, config)
    if not isinstance(executor, TorchExecutor):
        raise BadModel(f"{model} is a diffusion language model: open_leaf opens it")
    return executor


def open_leaf(
    model: str, config: EngineConfig | None = None, rule: CanvasRule | None = None
) -> TorchExecutor | DiffusionExecutor:
    """As open_executor, whichever way the model writes; `rule` is how one fills canvases."""
    config = config or EngineConfig()
    folder = find_model(
        model,
        endpoint=config.endpoint,
        cache_dir=config.cache_dir,
        revision=config.revision,
        is_offline=config.is_offline,
    )
    facts = model_facts(folder)
    if facts.canvas is not None:
        opened, num_blocks = open_diffusion(facts, config)
        return DiffusionExecutor(opened, num_blocks, facts, config, rule or CanvasRule())
    if config.host_blocks and config.tensor_parallel > 1:
        raise BadConfig(
            "jobs cannot be moved to host memory when a model is split over several processes",
            hint="leave cache.swap.host_blocks out, or use one process",
        )
    if config.tensor_parallel == 1:
        return TorchExecutor(build_decoder(facts, config, Alone(), None), facts, config)
    crew, built = TorchCrew.hire(facts, config)
    return TorchExecutor(built, facts, config, crew)
