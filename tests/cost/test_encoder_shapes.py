"""Encoders priced from their files: as many weights as transformers makes, and steps that end with the prompt."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from penstock.cost.hardware import card_of
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of_config
from penstock.cost.step import features_of

PUBLISHED = {
    # of sentence-transformers/all-MiniLM-L6-v2 as its card has it, less the pooler, which nobody asks
    "bert": (
        dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
             vocab_size=30522, max_position_embeddings=512, type_vocab_size=2),
        22_713_216 - 384 * 385,
    ),
}  # fmt: skip


def test_published_numbers_of_parameters() -> None:
    for kind, (told, params) in PUBLISHED.items():
        assert shape_of_config({"model_type": kind, **told}, kind).params == params


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "distilbert", "modernbert"])
def test_as_many_as_transformers_makes(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        pooled = {} if kind in ("distilbert", "modernbert") else {"add_pooling_layer": False}
        model = AutoModel.from_config(config, **pooled)
    shape = shape_of_config(config.to_dict(), kind)
    assert shape.params == sum(value.numel() for value in model.parameters())


def test_a_step_is_priced() -> None:
    shape = shape_of_config(AutoConfig.for_model("bert").to_dict(), "bert")
    model = Roofline(shape, card_of("a100-80g"))
    few, many = (model.seconds(features_of([(0, 512, False)] * count)) for count in (1, 64))
    assert 0 < few < many
