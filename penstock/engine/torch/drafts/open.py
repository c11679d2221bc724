"""From a configuration to whoever guesses.

A model that guesses keeps as many blocks as the served one, and both together stay within the memory that is set aside
for keys and values: each gets its part of it.
"""

from __future__ import annotations

import json
from dataclasses import replace

from penstock.core.drafts import Speculation
from penstock.core.errors import BadConfig
from penstock.engine.folder import ModelFacts, model_facts
from penstock.engine.tier_config import TiersConfig
from penstock.engine.torch.build import EngineConfig, build_decoder, choose_device, choose_dtype
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.drafts import Drafter
from penstock.engine.torch.drafts.model import DraftModel
from penstock.engine.torch.drafts.ngram import Ngrams
from penstock.engine.torch.hub import find_model
from penstock.engine.torch.memory import FREE_SHARE


def drafter_of(speculation: Speculation | None) -> Drafter | None:
    """Whoever needs no model; None where nobody guesses, or one does that is opened besides."""
    if speculation is None or speculation.method != "ngram":
        return None
    return Ngrams(speculation.min_ngram, speculation.max_ngram)


def draft_facts(config: EngineConfig, served: ModelFacts) -> ModelFacts | None:
    """The model that guesses for `served`, if one does. Raises BadConfig, BadModel."""
    told = config.speculation
    if told is None or told.model is None:
        return None
    if config.tensor_parallel > 1:
        raise BadConfig(
            "a draft model cannot guess for one that is split over several processes",
            hint='use speculation.method = "ngram", or one process',
        )
    folder = find_model(
        told.model,
        endpoint=config.endpoint,
        cache_dir=config.cache_dir,
        revision=told.revision,
        is_offline=config.is_offline,
    )
    facts = model_facts(folder)
    if facts.canvas is not None or facts.encoder is not None:
        raise BadConfig(f"the draft model {told.model} does not write from left to right")
    if facts.vocab_size != served.vocab_size or _tokens(facts) != _tokens(served):
        raise BadConfig(
            f"the draft model {told.model} has other tokens than the served one",
            hint="take a smaller model of the same family",
        )
    return facts


def _tokens(facts: ModelFacts) -> object:
    """What the numbers of tokens mean; None where the folder does not say."""
    path = facts.folder / "tokenizer.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("model", {}).get("vocab")


def beside(config: EngineConfig, served: ModelFacts, draft: ModelFacts) -> EngineConfig:
    """The served model's configuration with its part of the memory for keys and values."""
    device = choose_device(config.device)
    own, other = (_block_numbers(facts, config) for facts in (served, draft))
    share = own / (own + other)
    if config.memory_bytes is not None:
        return replace(config, memory_bytes=int(config.memory_bytes * share))
    free = FREE_SHARE.get(device.type, 0.5) if config.free_share is None else config.free_share
    return replace(config, free_share=free * share)


def _block_numbers(facts: ModelFacts, config: EngineConfig) -> int:
    """Bytes of one position."""
    shape, device = facts.shape, choose_device(config.device)
    dtype, _ = choose_dtype(config.dtype, shape.stored_dtype, device)
    heads, size, pieces = shape.num_kv_heads, shape.head_dim, 2
    if shape.latent is not None:
        heads, size, pieces = 1, shape.latent.cached, 1
    return shape.num_layers * pieces * heads * size * dtype.itemsize


def open_draft_model(facts: ModelFacts, config: EngineConfig, num_blocks: int) -> DraftModel:
    """Load it, with as many blocks as the served model has."""
    max_context = min(config.max_context or facts.max_context, facts.max_context)
    plain = replace(
        config,
        num_blocks=num_blocks,
        max_context=max_context,
        lanes=1,
        host_blocks=0,
        tiers=TiersConfig(),
        max_adapters=0,
        graphs="off",
    )
    return DraftModel(build_decoder(facts, plain, Alone(), None), max_context)
