"""What a masked diffusion model knows of text it never saw, and its model card.

accuracy   share of masked tokens whose likeliest guess is the token that was there
unigram    the same for always guessing the commonest token of the training text
nats       cross-entropy of masked tokens; of the unigram: with the training text's frequencies, one added to each
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from penstock.learn.local.corpus import Document
from penstock.learn.local.masked import MaskedDecoder
from penstock.learn.local.pretrain import Recipe
from penstock.learn.local.registers import facts
from penstock.learn.local.stream import Ids, Prepared
from penstock.learn.local.tokenizer import encode_plain

LENGTH = 256
SHARES = (0.15, 0.5, 0.85)
PARTS = {"text": ("code", "docs"), "pages": ("pages",)}


class Score(NamedTuple):
    """Of one kind of text with one share of its tokens masked."""

    part: str
    share: float
    accuracy: float
    unigram: float
    nats: float
    unigram_nats: float
    num: int


def scores(
    model: MaskedDecoder, prepared: Prepared, held_out: Sequence[Document], limit: int = 32_768
) -> list[Score]:
    """On at most `limit` tokens of each kind, the same masks every time."""
    found = []
    for part, kinds in PARTS.items():
        rows = windows(prepared.tokenizer, [one for one in held_out if one.kind in kinds])
        counts = torch.bincount(rows.flatten(), minlength=model.shape.vocab_size)
        frequency = counts / counts.sum()
        picked = rows[:: max(1, len(rows) * LENGTH // limit)]
        found += [score(model, frequency, picked, part, share) for share in SHARES]
    return [*found, facts_score(model, prepared.tokenizer, held_out)]


def windows(tokenizer: Tokenizer, documents: Iterable[Document]) -> torch.Tensor:
    """[count, LENGTH]; what is left at the end is not used."""
    texts = [document.text for document in documents]
    flat: Ids = np.concatenate([np.array(ids, np.uint16) for ids in encode_plain(tokenizer, texts)])
    whole = len(flat) // LENGTH * LENGTH
    return torch.from_numpy(flat[:whole].astype(np.int64)).view(-1, LENGTH)


@torch.no_grad()
def facts_score(model: MaskedDecoder, tokenizer: Tokenizer, documents: Iterable[Document]) -> Score:
    """See the module's text."""
    right, nats, told, num_tokens = 0, 0.0, Counter[int](), 0
    for text in [one.text for one in documents if one.kind == "pages"]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor([encoding.ids])
        for spans in facts(text):
            masked = [
                any([a < end and b > start for start, end in spans]) for a, b in encoding.offsets
            ]
            is_masked = torch.tensor([masked])
            logits, wanted = model.masked_logits(ids, is_masked), ids[is_masked]
            nats += float(F.cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(-1) == wanted).sum())
            told.update(wanted.tolist())
            num_tokens += len(masked)
    num = told.total()
    plain = -sum([count * math.log(count / num) for count in told.values()]) / num
    common = max(told.values()) / num
    return Score("facts", num / num_tokens, right / num, common, nats / num, plain, num)


@torch.no_grad()
def score(
    model: MaskedDecoder, frequency: torch.Tensor, rows: torch.Tensor, part: str, share: float
) -> Score:
    chance = torch.Generator().manual_seed(0)
    right = common = num = 0
    nats = plain = 0.0
    for ids in torch.split(rows, 8):
        is_masked = torch.rand(ids.shape, generator=chance) < share
        logits, wanted = model.masked_logits(ids, is_masked), ids[is_masked]
        nats += float(F.cross_entropy(logits, wanted, reduction="sum"))
        plain -= float(frequency[wanted].log().sum())
        right += int((logits.argmax(-1) == wanted).sum())
        common += int((wanted == frequency.argmax()).sum())
        num += len(wanted)
    return Score(part, share, right / num, common / num, nats / num, plain / num, num)


def written(recipe: Recipe, prepared: Prepared, found: Sequence[Score]) -> str:
    """README.md of the model's folder."""
    shape, sizes = recipe.shape, prepared.sizes
    num_weights = MaskedDecoder(shape).parameter_count()
    windows_told = ", ".join([str(size) for _, size in recipe.contexts])
    rows = "\n".join([_row(one) for one in found])
    return f"""---
license: other
license_name: psf-2.0
language: [code, en]
tags: [masked-diffusion, llada]
---

# A tiny masked diffusion model

{num_weights:,} parameters in LLaDA's format, {2 * num_weights / 1e6:.2f} MB in bf16, made from nothing by
`penstock train diffusion --steps {recipe.steps} --seed {recipe.seed}`: for tests, and to try serving of this kind of
model at once. It fills in Python and made-up lists; it is no assistant. No other model's weights or outputs were used.

## Data

The standard library of Python {platform.python_version()} under the PSF licence ({sizes.get("code", 0) / 1e6:.1f} MB of
sources, {sizes.get("docs", 0) / 1e6:.1f} MB of documentation, {sizes.get("chat", 0) / 1e6:.1f} MB of questions and
answers from docstrings) and {sizes.get("pages", 0) / 1e6:.1f} MB of made-up pages
(`penstock.learn.local.registers`, Apache-2.0): lists of things, told again in part below.
Held out: {sizes["held_out"] / 1e6:.2f} MB, sources by a hash of their names, and pages of their own; some of
them lie in `held_out.jsonl`, for `penstock bench agreement`.

## Recipe

- {shape.num_hidden_layers} layers, width {shape.hidden_size}, {shape.num_attention_heads} heads, SwiGLU of \
{shape.intermediate_size}, tied embeddings, {shape.max_position_embeddings} positions, byte-level BPE of \
{shape.vocab_size - 1} tokens and the mask.
- LLaDA's objective: t ~ U(0, 1), tokens masked with p = 0.999 t + 0.001, cross-entropy over p; in every second row the
  tokens before a random place stay unmasked.
- {recipe.steps} steps of {recipe.tokens_per_step} tokens; windows of {windows_told}; Muon for matrices and
  AdamW for the rest, peak rate {recipe.rate}.

## On held-out text

Masked tokens guessed right, against always guessing the commonest token of the same texts (unigram), and nats a masked
token, against the frequencies of the same texts. Windows of {LENGTH} tokens; facts: pages, of one of whose three
recaps all facts are masked and nothing else. Who looks them up in the list above guesses them all; this model has not
learned to, it goes by the words nearby.

| text | masked | right | unigram | nats | unigram | tokens |
|---|---|---|---|---|---|---|
{rows}
"""


def _row(one: Score) -> str:
    return (
        f"| {one.part} | {one.share:.0%} | {one.accuracy:.1%} | {one.unigram:.1%} | {one.nats:.2f} "
        f"| {one.unigram_nats:.2f} | {one.num} |"
    )
