"""A small masked diffusion model from nothing: its text, the loop, and a folder that opens as LLaDA.

The text is the standard library's (corpus), questions and answers made from its docstrings, and pages of made-up lists
(registers), about as many tokens of pages as of the rest. A run is a pure function of its seed, of the number of steps
and of the Python it runs on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from penstock.engine.torch.diffusion.open import llada_name
from penstock.learn.local.corpus import Corpus, Document, bucket, gather
from penstock.learn.local.decoder import Shape
from penstock.learn.local.dialogue import TEXT_END, TURN_END
from penstock.learn.local.masked import MaskedDecoder, drawn_noise
from penstock.learn.local.masked_card import scores, written
from penstock.learn.local.optimise import Optimiser
from penstock.learn.local.pretrain import Recipe
from penstock.learn.local.registers import halves, pages
from penstock.learn.local.stream import Prepared, Windows, prepare
from penstock.learn.local.tokenizer import save_tokenizer, special_id

MASK = "<|mask|>"
NUM_PAGES, NUM_HELD_OUT = 12_000, 100
SOURCES_ONE_IN = 4
NUM_ASKED, PIECE = 12, 600  # prompts of each kind that lie beside the weights; characters
HELD_OUT = "held_out.jsonl"
SMALL = Recipe(
    shape=Shape(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
    ),
    steps=1000,
    tokens_per_step=4096,
    tokens_at_once=2048,
    contexts=((0.6, 128), (0.9, 256), (1.0, 512)),
    rate=8e-3,
)


def train_diffusion(
    out: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    runs: Path = Path("runs/diffusion"),
    recipe: Recipe = SMALL,
    corpus: Corpus | None = None,
) -> Path:
    """Train, export into `out` and write its README.md; tokens of the text are kept in `runs`."""
    recipe = replace(recipe, steps=steps or recipe.steps, seed=seed)
    torch.set_num_threads(1)
    corpus = corpus or with_pages(gather(), recipe.seed)
    prepared = prepare(
        corpus,
        runs,
        vocab_size=recipe.shape.vocab_size - 1,
        chat_share=recipe.chat_share,
        seed=recipe.seed,
    )
    model = learned(recipe, prepared)
    export(model, prepared.tokenizer, out)
    found = scores(model, prepared, corpus.held_out)
    (out / "README.md").write_text(written(recipe, prepared, found), encoding="utf-8")
    lines = "".join([json.dumps(one) + "\n" for one in asked(corpus.held_out)])
    (out / HELD_OUT).write_text(lines, encoding="utf-8")
    return out


def asked(held_out: Sequence[Document]) -> list[dict[str, str]]:
    """Prompts and how they go on, of documents never learned from: pages, and pieces of sources."""
    made = [one for one in held_out if one.kind == "pages"][:NUM_ASKED]
    found = []
    for document in made:
        prompt, answer = halves(document.text)
        found.append({"kind": "pages", "prompt": prompt, "answer": answer})
    sources = [one for one in held_out if one.kind == "code" and len(one.text) > 2 * PIECE]
    for document in sources[:NUM_ASKED]:
        at = document.text.index("\n", len(document.text) // 2 - PIECE) + 1
        end = document.text.index("\n", at + PIECE // 2) + 1
        prompt, answer = document.text[at:end], document.text[end : at + PIECE]
        found.append({"kind": "sources", "prompt": prompt, "answer": answer})
    return found


def with_pages(corpus: Corpus, seed: int) -> Corpus:
    """The documentation, one in four sources, and pages; pages are held out too."""
    kept = [
        one
        for one in corpus.train
        if one.kind == "docs" or (one.kind == "code" and bucket(one.name, SOURCES_ONE_IN) == 0)
    ]
    made = pages(NUM_PAGES, seed=seed)
    held = pages(NUM_HELD_OUT, seed=seed, name="held out")
    return Corpus((*kept, *made), (*corpus.held_out, *held))


def learned(recipe: Recipe, prepared: Prepared) -> MaskedDecoder:
    torch.manual_seed(recipe.seed)
    model = MaskedDecoder(recipe.shape)
    optimiser = Optimiser(model, decay=recipe.decay)
    chance = torch.Generator().manual_seed(recipe.seed)
    steps = recipe.steps
    assert steps is not None
    windows = {size: Windows(prepared.train, size, recipe.seed) for _, size in recipe.contexts}
    bar = tqdm(range(steps), unit="step", mininterval=1.0)
    with ThreadPoolExecutor(1) as pool:
        for step in bar:
            progress = step / steps
            context = recipe.context(progress)
            count = recipe.tokens_per_step // context
            rows = windows[context].rows(step * count, count)[:, :-1]
            loss, gradients = _gradients(model, optimiser, recipe, rows, chance)
            optimiser.step(gradients, recipe.rate_at(progress), pool)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    return model.eval()


def _gradients(
    model: MaskedDecoder,
    optimiser: Optimiser,
    recipe: Recipe,
    rows: Tensor,
    chance: torch.Generator,
) -> tuple[float, list[Tensor]]:
    """In parts that fit into the caches."""
    at_once = max(1, recipe.tokens_at_once // rows.shape[1])
    parts = [rows[first : first + at_once] for first in range(0, len(rows), at_once)]
    total, summed = 0.0, [torch.zeros_like(weight) for weight in optimiser.everything]
    for part in parts:
        loss = model.diffusion_loss(part, drawn_noise(part, chance)) / len(parts)
        for whole, each in zip(
            summed, torch.autograd.grad(loss, optimiser.everything), strict=True
        ):
            whole.add_(each)
        total += float(loss.detach())
    return total, summed


def export(model: MaskedDecoder, tokenizer: Tokenizer, folder: Path) -> Path:
    """bf16 weights under LLaDA's names, its configuration and the tokenizer with the mask as the last token."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = [special_id(tokenizer, TEXT_END), special_id(tokenizer, TURN_END)]
    _write(folder / "config.json", config(model.shape, ends))
    defaults = {"eos_token_id": ends, "pad_token_id": ends[0], "do_sample": False}
    _write(folder / "generation_config.json", defaults)
    tokenizer.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
    assert special_id(tokenizer, MASK) == model.mask_id, "the vocabulary has another size"
    save_tokenizer(tokenizer, folder, model.shape.max_position_embeddings)
    weights = {
        llada_name(name): weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    return folder


def config(shape: Shape, ends: list[int]) -> dict[str, Any]:
    """The content of config.json, in LLaDA's words."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": shape.hidden_size,
        "n_heads": shape.num_attention_heads,
        "n_kv_heads": shape.num_key_value_heads,
        "n_layers": shape.num_hidden_layers,
        "mlp_hidden_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "embedding_size": shape.vocab_size,
        "max_sequence_length": shape.max_position_embeddings,
        "rope": True,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "layer_norm_type": "rms",
        "block_type": "llama",
        "activation_type": "silu",
        "alibi": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": True,
        "mask_token_id": shape.vocab_size - 1,
        "eos_token_id": ends[0],
        "pad_token_id": ends[0],
        "torch_dtype": "bfloat16",
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
