"""Measures of a finished model: bits per held-out byte, and what it writes after fixed prompts."""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer

from penstock.learn.local.corpus import Document
from penstock.learn.local.decoder import Decoder
from penstock.learn.local.dialogue import ASSISTANT, TEXT_END, TURN_END, USER
from penstock.learn.local.tokenizer import encode_plain, special_id


@torch.no_grad()
def bits_per_byte(
    model: Decoder, tokenizer: Tokenizer, documents: list[Document], context: int | None = None
) -> float:
    """Every document from its own start, every token once, each with at least half a window before it."""
    context = context or model.shape.max_position_embeddings
    start = special_id(tokenizer, TEXT_END)
    nats: list[float] = []
    for ids in encode_plain(tokenizer, [document.text for document in documents]):
        row = torch.tensor([start, *ids])
        done = 1
        while done < len(row):
            end = min(len(row), done + (context // 2 if done > 1 else context))
            begin = max(0, end - context - 1)
            losses = model.token_losses(row[None, begin : end - 1], row[None, begin + 1 : end])[0]
            nats.append(float(losses[done - begin - 1 :].sum()))
            done = end
    return math.fsum(nats) / math.log(2) / sum(document.size for document in documents)


@torch.no_grad()
def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    seed: int = 0,
) -> str:
    """What the model writes after the prompt; greedy at temperature zero."""
    ends = {special_id(tokenizer, TEXT_END), special_id(tokenizer, TURN_END)}
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    prompt_length = len(ids)
    for _ in range(tokens):
        logits = model(torch.tensor([ids[-model.shape.max_position_embeddings :]]))[0, -1].float()
        if temperature > 0:
            chances = (logits / temperature).softmax(-1)
            chosen = int(torch.multinomial(chances, 1, generator=generator))
        else:
            chosen = int(logits.argmax())
        if chosen in ends:
            break
        ids.append(chosen)
    return tokenizer.decode(ids[prompt_length:])


def asked(question: str) -> str:
    """The prompt that the chat template makes of one question."""
    return f"{USER}{question}{TURN_END}{ASSISTANT}"
