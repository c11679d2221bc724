"""Tokens in the order they are learned from: a pure function of seed, step and context, so resuming needs no state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from penstock.core.errors import BadConfig
from penstock.learn.local.corpus import Corpus, Document
from penstock.learn.local.dialogue import TEXT_END, conversations
from penstock.learn.local.tokenizer import encode_plain, special_id, train_tokenizer

Ids = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run needs on disk: the tokenizer, the ids to learn from, the ids held out, and the sizes."""

    tokenizer: Tokenizer
    train: Ids
    held_out: Ids
    sizes: dict[str, int]


def prepare(
    corpus: Corpus, folder: Path, *, vocab_size: int, chat_share: float, seed: int
) -> Prepared:
    """Tokenise the corpus into `folder`, or take what lies there if it was made from the same documents."""
    key = _fingerprint(corpus, vocab_size, chat_share, seed)
    sizes_file = folder / "corpus.json"
    if sizes_file.exists():
        stored = json.loads(sizes_file.read_text(encoding="utf-8"))
        if stored["fingerprint"] != key:
            raise BadConfig(
                f"{folder} holds a run on another corpus or with other settings",
                hint="choose another folder with --runs",
            )
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        train, held_out = np.load(folder / "train.npy"), np.load(folder / "held_out.npy")
        return Prepared(tokenizer, train, held_out, stored["bytes"])
    folder.mkdir(parents=True, exist_ok=True)
    chat = conversations(corpus.train, share=chat_share, seed=seed)
    tokenizer = train_tokenizer((document.text for document in corpus.train), vocab_size)
    documents = [*corpus.train, *chat]
    order = np.random.default_rng(seed).permutation(len(documents))
    train = _ids(tokenizer, (documents[index] for index in order))
    held_out = _ids(tokenizer, corpus.held_out)
    sizes = _sizes(corpus, chat)
    tokenizer.save(str(folder / "tokenizer.json"))
    np.save(folder / "train.npy", train)
    np.save(folder / "held_out.npy", held_out)
    sizes_file.write_text(
        json.dumps({"fingerprint": key, "bytes": sizes}, indent=2) + "\n", encoding="utf-8"
    )
    return Prepared(tokenizer, train, held_out, sizes)


def _ids(tokenizer: Tokenizer, documents: Iterable[Document]) -> Ids:
    """Every document after a text-end token. Only chat documents may spell special tokens."""
    documents = list(documents)
    end = special_id(tokenizer, TEXT_END)
    plain = [index for index, document in enumerate(documents) if document.kind != "chat"]
    rows: dict[int, list[int]] = dict(
        zip(plain, encode_plain(tokenizer, [documents[index].text for index in plain]), strict=True)
    )
    for index, document in enumerate(documents):
        if document.kind == "chat":
            rows[index] = tokenizer.encode(document.text, add_special_tokens=False).ids
    return np.concatenate(
        [np.array([end, *rows[index]], dtype=np.uint16) for index in range(len(documents))]
    )


def _sizes(corpus: Corpus, chat: list[Document]) -> dict[str, int]:
    sizes: dict[str, int] = {"held_out": sum(document.size for document in corpus.held_out)}
    for document in [*corpus.train, *chat]:
        sizes[document.kind] = sizes.get(document.kind, 0) + document.size
    return sizes


def _fingerprint(corpus: Corpus, vocab_size: int, chat_share: float, seed: int) -> str:
    digest = hashlib.sha256(f"{vocab_size} {chat_share} {seed}".encode())
    for document in [*corpus.train, *corpus.held_out]:
        digest.update(document.name.encode() + b"\0" + document.text.encode() + b"\0")
    return digest.hexdigest()


class Windows:
    """Windows of one context length over the ids, shuffled anew every epoch with a new offset."""

    def __init__(self, ids: Ids, context: int, seed: int) -> None:
        if len(ids) < 2 * context + 1:
            raise ValueError(f"{len(ids)} tokens are too few for windows of {context}")
        self.ids, self.context, self.seed = ids, context, seed
        self.per_epoch = (len(ids) - 1) // context - 1
        self._epoch: int | None = None

    def rows(self, first: int, count: int) -> Tensor:
        """Windows number `first` and on, each of context + 1 ids."""
        taken = [self._row(index) for index in range(first, first + count)]
        return torch.from_numpy(np.stack(taken).astype(np.int64))

    def _row(self, index: int) -> Ids:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch, self.context))
            self._offset = int(generator.integers(self.context))
            self._order = generator.permutation(self.per_epoch)
            self._epoch = epoch
        start = self._offset + int(self._order[place]) * self.context
        return self.ids[start : start + self.context + 1]
