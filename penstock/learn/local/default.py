"""The embedded default model: `train_default` gathers the text, trains, exports and writes the model card."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

from penstock.core.types import SCHEMA
from penstock.learn.local.card import require_plotting, write_card
from penstock.learn.local.corpus import Corpus, gather
from penstock.learn.local.decoder import Shape
from penstock.learn.local.export import export
from penstock.learn.local.pretrain import Recipe, pretrain
from penstock.learn.local.stream import prepare

FULL = Recipe(
    shape=Shape(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
)
TINY = Recipe(
    shape=Shape(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
    ),
    steps=20,
    tokens_per_step=256,
    tokens_at_once=128,
    contexts=((0.8, 32), (1.0, 64)),
    eval_every=10,
    eval_tokens=256,
)


def train_default(  # noqa: PLR0913 - keyword options, one a flag
    out: Path,
    *,
    minutes: float = 45.0,
    steps: int | None = None,
    resume: bool = True,
    device: str = "cpu",
    seed: int = 0,
    threads: int | None = None,
    runs: Path = Path("runs/default"),
    recipe: Recipe = FULL,
    corpus: Corpus | None = None,
    card: bool = True,
    stop_after: int | None = None,
) -> Path:
    """Train the embedded model from scratch and leave it in the folder `out`, which is returned.

    The schedule ends after `minutes` of training, or after `steps` if given (then the run is exactly repeatable).
    Checkpoints and the loss log lie in `runs`; with `resume` a run found there is taken up where it stopped.
    `card` measures the model on the held-out files against xz and a 5-gram model and writes README.md and
    loss.png. `recipe`, `corpus` and `stop_after` exist for experiments and tests.
    """
    if card:
        require_plotting()
    lanes = threads or (1 if device != "cpu" else torch.get_num_threads())
    if device == "cpu":
        torch.set_num_threads(1)
    recipe = replace(
        recipe, minutes=minutes, steps=steps if steps is not None else recipe.steps, seed=seed
    )
    corpus = corpus if corpus is not None else gather()
    prepared = prepare(
        corpus,
        runs,
        vocab_size=recipe.shape.vocab_size,
        chat_share=recipe.chat_share,
        seed=recipe.seed,
    )
    _note_recipe(recipe, runs)
    model = pretrain(
        recipe, prepared, runs, device=device, resume=resume, lanes=lanes, stop_after=stop_after
    )
    export(model, prepared.tokenizer, out)
    if card:
        write_card(out, runs, corpus, recipe)
    return out


def _note_recipe(recipe: Recipe, runs: Path) -> None:
    partial = runs / "recipe.json.part"
    partial.write_text(
        json.dumps({"schema": SCHEMA, **asdict(recipe)}, indent=2) + "\n", encoding="utf-8"
    )
    os.replace(partial, runs / "recipe.json")
