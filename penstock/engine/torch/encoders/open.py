"""From a model folder to an EncoderExecutor."""

from __future__ import annotations

from penstock.core.errors import BadConfig, BadModel
from penstock.engine.folder import ModelFacts
from penstock.engine.torch.build import EngineConfig, choose_device, choose_dtype
from penstock.engine.torch.encoders.executor import EncoderExecutor
from penstock.engine.torch.encoders.load import load_encoder
from penstock.engine.torch.encoders.package import Package
from penstock.engine.torch.encoders.pooling import Pooler
from penstock.engine.torch.kernels import build_with
from penstock.engine.torch.linear import choose_methods
from penstock.engine.torch.memory import CONTEXTS
from penstock.engine.torch.weights import WeightFolder


def open_encoder(facts: ModelFacts, config: EngineConfig) -> EncoderExecutor:
    """Raises BadModel, BadConfig."""
    shape = facts.encoder
    if shape is None:
        raise BadModel(f"{facts.folder} holds no encoder")
    if config.tensor_parallel != 1:
        raise BadConfig("encoders run in one process here", hint="leave out tensor_parallel")
    build_with(config.compiler, config.kernel_cache)
    device = choose_device(config.device)
    dtype, why_dtype = choose_dtype(config.dtype, shape.stored_dtype, device)
    methods = choose_methods(device, dtype, config.weights, is_plain=config.linear == "plain")
    folder = WeightFolder(facts.folder, dtype, device)
    model = load_encoder(folder, shape, methods.layers, Pooler(facts.package, device))
    folder.close()
    notes = {
        "device": str(device),
        "dtype": f"{str(dtype).removeprefix('torch.')}: {why_dtype}",
        **methods.notes,
        "attention": "packed, both sides",
        "vectors": described(facts.package, shape.hidden)
        if shape.labels is None
        else f"{shape.labels.count} label(s)",
    }
    blocks = CONTEXTS * (facts.max_context // config.block_size + 1)
    return EncoderExecutor(model, config.num_blocks or blocks, facts, config, notes)


def described(package: Package, hidden: int) -> str:
    """For people."""
    length = ", of length one" if package.is_normed else ""
    why = "as packaged" if package.is_told else "the folder has no modules.json"
    return f"{package.width(hidden)} numbers from {' and '.join(package.modes)}{length}: {why}"
