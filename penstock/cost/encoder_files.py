"""Shapes of encoders (BERT, RoBERTa, MPNet, DistilBERT, ModernBERT) from their config.json.

They are priced as decoders of the same sizes that sample nothing: the same products, and attention over the positions
before a token where an encoder sees both sides, which is half of what it multiplies there. At 512 tokens and a width of
768 that is 5 % of a text's flops. No position leaves anything behind, so what is said of a cache is of one that is not
there. Poolers and labels are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DISTIL_KEYS = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
}
BERTS = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert")
ENCODERS = (*BERTS, "modernbert")


def as_decoder(table: Mapping[str, Any]) -> dict[str, Any]:
    """The file in the words that decoders use."""
    named = {ours: table[key] for ours, key in DISTIL_KEYS.items() if key in table}
    return {**table, **named, "tie_word_embeddings": True}


def small_params(kind: str, table: Mapping[str, Any]) -> int:
    """Weights in no matrix, beyond the two norms of a layer, a last one, and biases of queries, keys and values."""
    hidden, layers = int(table["hidden_size"]), int(table["num_hidden_layers"])
    if kind == "modernbert":
        return 0  # the norm of the embeddings is there, and that before the first attention is not
    positions = int(table.get("max_position_embeddings", 512))
    types = 0 if kind in ("mpnet", "distilbert") else int(table.get("type_vocab_size", 2))
    distances = 32 * int(table["num_attention_heads"]) if kind == "mpnet" else 0
    each = 4 * hidden + int(table["intermediate_size"])
    return layers * each + (positions + types + 1) * hidden + distances
