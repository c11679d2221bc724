"""Models of random weights: speed depends on shapes, not on what was learned.

A folder as Hugging Face lays it out (config.json, one safetensors file in bf16, a tokenizer that spells every token, as
converters of other engines want one), made once and kept. Numbers are normal with deviation 0.02, the same every time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.core.errors import BadConfig
from penstock.engine.folder import DEFAULT_FOLDER, local_folder

DEVIATION = 0.02
Size = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModel:
    """`kind`: Hugging Face's name of the family; it has norms of queries and keys when it is qwen3."""

    name: str
    kind: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    wide: int
    vocab: int

    def config(self) -> dict[str, Any]:
        """Its config.json. Embeddings are tied."""
        family = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[self.kind]
        return {
            "architectures": [family],
            "model_type": self.kind,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.wide,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[tuple[str, Size]]:
        """Names and shapes, in the order of the file. One of one dimension is a norm."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            yield f"{at}self_attn.q_proj.weight", (query, self.hidden)
            yield f"{at}self_attn.k_proj.weight", (key, self.hidden)
            yield f"{at}self_attn.v_proj.weight", (key, self.hidden)
            yield f"{at}self_attn.o_proj.weight", (self.hidden, query)
            yield f"{at}mlp.gate_proj.weight", (self.wide, self.hidden)
            yield f"{at}mlp.up_proj.weight", (self.wide, self.hidden)
            yield f"{at}mlp.down_proj.weight", (self.hidden, self.wide)
            yield f"{at}input_layernorm.weight", (self.hidden,)
            yield f"{at}post_attention_layernorm.weight", (self.hidden,)
            if self.kind == "qwen3":
                yield f"{at}self_attn.q_norm.weight", (self.head_dim,)
                yield f"{at}self_attn.k_norm.weight", (self.head_dim,)
        yield "model.norm.weight", (self.hidden,)


def _model(name: str, kind: str, sizes: tuple[int, ...]) -> RandomModel:
    layers, hidden, heads, kv_heads, head_dim, wide, vocab = sizes
    return RandomModel(
        name=name,
        kind=kind,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        wide=wide,
        vocab=vocab,
    )


RANDOM_MODELS = {
    model.name: model
    for model in (
        _model("qwen3-0.6b", "qwen3", (28, 1024, 16, 8, 128, 3072, 151936)),
        _model("llama-160m", "llama", (18, 768, 12, 4, 64, 2560, 32000)),
        _model("llama-25m", "llama", (8, 384, 6, 2, 64, 1024, 16384)),
    )
}


def model_folder(name: str, scratch: Path) -> Path:
    """The folder of a model: one there is, or one of random weights, made now if need be. Raises BadConfig."""
    model = RANDOM_MODELS.get(name)
    if model is None:
        folder = local_folder(name)
        if folder is None:
            known = ", ".join(RANDOM_MODELS)
            raise BadConfig(
                f"there is no model folder {name}", hint=f"give a folder, or one of {known}"
            )
        return folder.resolve()
    folder = scratch / "models" / name
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(model, folder / "model.safetensors")
        _write_tokenizer(model, folder)
        (folder / "config.json").write_text(json.dumps(model.config(), indent=2))
    return folder


def _write_weights(model: RandomModel, path: Path) -> None:
    """The format is a length, a table of contents as JSON, and the numbers."""
    import numpy as np

    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in model.tensors():
        end = at + 2 * math.prod(size)
        table[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, end]}
        at = end
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _, size in model.tensors():
            if len(size) == 1:
                numbers = np.ones(size, dtype=np.float32)
            else:
                numbers = random.standard_normal(size, dtype=np.float32) * np.float32(DEVIATION)
            file.write((numbers.view(np.uint32) >> 16).astype("<u2").tobytes())


def _write_tokenizer(model: RandomModel, folder: Path) -> None:
    """The default model's, with as many unused tokens more as the vocabulary has."""
    told = json.loads((DEFAULT_FOLDER / "tokenizer.json").read_text())
    vocab: dict[str, int] = told["model"]["vocab"]
    first = 1 + max(max(vocab.values()), *(each["id"] for each in told["added_tokens"]))
    vocab.update({f"<unused {number}>": number for number in range(first, model.vocab)})
    (folder / "tokenizer.json").write_text(json.dumps(told, ensure_ascii=False))
    settings = json.loads((DEFAULT_FOLDER / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
