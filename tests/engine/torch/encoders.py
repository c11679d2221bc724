"""Small random encoders of every family, made and judged by transformers, packaged as sentence-transformers does."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    MPNetModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

SIZE = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=256,
    initializer_range=0.15,
)
DISTIL = dict(
    vocab_size=512, dim=64, hidden_dim=96, n_layers=3, n_heads=4, max_position_embeddings=256,
    initializer_range=0.15,
)  # fmt: skip
MODERN = dict(
    SIZE, local_attention=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
    sep_token_id=2, initializer_cutoff_factor=20.0, classifier_bias=True,
)  # fmt: skip
ENCODERS: dict[str, tuple[type[PreTrainedModel], type, dict[str, object]]] = {
    "bert": (BertModel, BertConfig, SIZE),
    "roberta": (RobertaModel, RobertaConfig, SIZE),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig, SIZE),
    "mpnet": (MPNetModel, MPNetConfig, SIZE),
    "distilbert": (DistilBertModel, DistilBertConfig, DISTIL),
    "modernbert": (ModernBertModel, ModernBertConfig, MODERN),
}
RANKERS: dict[str, tuple[type[PreTrainedModel], type, dict[str, object]]] = {
    "bert-ranks": (BertForSequenceClassification, BertConfig, dict(SIZE, num_labels=1)),
    "roberta-ranks": (RobertaForSequenceClassification, RobertaConfig, dict(SIZE, num_labels=1)),
    "mpnet-ranks": (MPNetForSequenceClassification, MPNetConfig, dict(SIZE, num_labels=3)),
    "distilbert-ranks": (
        DistilBertForSequenceClassification,
        DistilBertConfig,
        dict(DISTIL, num_labels=1),
    ),
    "modernbert-ranks": (
        ModernBertForSequenceClassification,
        ModernBertConfig,
        dict(MODERN, num_labels=1, classifier_pooling="mean"),
    ),
}


@cache
def saved_encoder(root: Path, name: str) -> tuple[Path, PreTrainedModel]:
    """(folder, the reference), with uneven norms and biases, so that forgetting any of them shows."""
    model_class, config_class, told = {**ENCODERS, **RANKERS}[name]
    torch.manual_seed(3)
    model = model_class(config_class(**told))
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.add_(torch.randn_like(value) * 0.1)
    folder = root / name
    model.eval().save_pretrained(folder)
    return folder, model


def package(folder: Path, modes: list[str], *, is_normed: bool = True, **texts: object) -> None:
    """modules.json and what it names, as sentence-transformers writes them."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if is_normed else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": at, "name": str(at), "path": paths[at], "type": f"sentence_transformers.models.{kind}"}
        for at, kind in enumerate(kinds)
    ]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {"word_embedding_dimension": 64, **{f"pooling_mode_{mode}": True for mode in modes}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    length = texts.pop("max_seq_length", 200)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(texts))


def states_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[tokens, hidden] of the last layer."""
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return found
