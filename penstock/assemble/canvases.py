"""The modelled leaf of a diffusion language model: what fits on the card beside activations and logits, and its steps.

Blocks are those that are left when activations and logits are set aside for as many answers of USUAL_TOKENS
positions as the card holds (cost.diffusion); `num_blocks` says otherwise.
"""

from __future__ import annotations

from penstock.cluster.predictors import predictors_of
from penstock.cluster.spec import Outside, ReplicaSpec
from penstock.core.errors import BadConfig
from penstock.core.ports import Log
from penstock.core.types import Caps
from penstock.cost.diffusion import CanvasCost, CanvasMemory, Logits, sized_for
from penstock.cost.hardware import card_of
from penstock.cost.shapes import CANVASSED, ModelShape
from penstock.engine.folder import local_folder, model_facts
from penstock.sim.canvases import ModelledCanvases
from penstock.sim.executor import SchedulerTime

USUAL_TOKENS = 1024


def fills_canvases(spec: ReplicaSpec) -> bool:
    """Whether the model fills masks in any order. Raises BadConfig where model and batch policy do not go together."""
    folder = local_folder(spec.model)
    if folder is None:
        is_canvassed = spec.model.lower() in CANVASSED
    else:
        is_canvassed = model_facts(folder).canvas is not None
    batch = spec.policies["batch"]["name"]
    if is_canvassed and batch != "diffusion":
        raise BadConfig(
            f"{spec.model} is a diffusion language model, which batch policy {batch} cannot run",
            hint="use --policy dllm-serve",
        )
    if batch == "diffusion" and not is_canvassed:
        raise BadConfig(
            f"batch policy diffusion runs diffusion language models, and {spec.model} is none",
            hint=f"model one of {', '.join(sorted(CANVASSED))}, or take another policy",
        )
    return is_canvassed


def canvas_outside(
    spec: ReplicaSpec, shape: ModelShape, scheduler: SchedulerTime | None, log: Log
) -> Outside:
    """Raises BadConfig for what canvases cannot do."""
    executor = spec.executor
    if executor.gpu is None or executor.tensor_parallel > 1:
        raise BadConfig(
            "a modelled diffusion language model needs `gpu`, and runs on one",
            hint='for example --set fleet.0.executor.gpu="l40s"',
        )
    has_slower = spec.swap.host_blocks or spec.tiers.host_bytes is not None
    if has_slower or (executor.lanes or 1) > 1 or executor.templates:
        raise BadConfig("a diffusion language model has no host memory, lanes or templates")
    card = card_of(executor.gpu)
    memory = CanvasMemory(shape=shape, card=card, logits=Logits(), rule=executor.canvas)
    if not memory.batch(USUAL_TOKENS):
        raise BadConfig(f"{spec.model} does not fit on {card.name}", hint="name a larger card")
    blocks = sized_for(memory, USUAL_TOKENS).num_blocks(USUAL_TOKENS, spec.block_size)
    caps = Caps(
        num_layers=shape.layers,
        max_context=min(shape.max_context, executor.max_context or shape.max_context),
        canvas=executor.canvas,
    )
    return Outside(
        executor=ModelledCanvases(CanvasCost(shape, card), caps=caps, scheduler=scheduler),
        num_blocks=spec.num_blocks or blocks,
        predictors=predictors_of(executor, shape, spec.lengths),
        log=log,
    )
