"""What a model makes of a text that it reads whole, as far as the gateway must know; and how such texts are cut.

A text that is too long is refused unless the caller says where to cut it. Then its beginning is kept, and the marks
that the tokenizer puts around a text stay whole, as the reference implementations cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Encoding

from penstock.core.errors import BadRequest, ContextTooLong
from penstock.engine.torch.diffusion.families import is_diffusion
from penstock.engine.torch.encoders.package import Package, read_package
from penstock.engine.torch.encoders.shape import is_encoder, read_encoder
from penstock.gateway.errors import Unsupported

if TYPE_CHECKING:
    from penstock.gateway.text import TextModel


Use = Literal["writes", "embeds", "ranks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """`labels` None: the model embeds. `is_chance`: its only label goes through a sigmoid. `writes`: text too."""

    package: Package
    width: int
    context_tokens: int | None = (
        None  # what an encoder holds, which its files spell in several ways
    )
    labels: int | None = None
    is_chance: bool = True
    is_encoder: bool = False
    writes: bool = True


def vectors_of(folder: Path, config: Mapping[str, Any]) -> Vectors | None:
    """None of models that fill masks. Raises BadModel."""
    if is_diffusion(config):
        return None
    found = is_encoder(config)
    package = read_package(folder, is_encoder=found)
    if not found:
        width = config.get("hidden_size")
        return Vectors(
            package=package,
            width=package.width(width if isinstance(width, int) else 0),
            context_tokens=package.max_tokens,
            writes=not package.is_told,
        )
    shape = read_encoder(config, str(folder / "config.json"))
    return Vectors(
        package=package,
        width=package.width(shape.hidden),
        context_tokens=package.holds(shape.max_context),
        labels=None if shape.labels is None else shape.labels.count,
        is_chance=_is_chance(config),
        is_encoder=True,
        writes=False,
    )


def _is_chance(config: Mapping[str, Any]) -> bool:
    """sentence-transformers puts a sigmoid behind a single label unless the file names another function."""
    newer = config.get("sentence_transformers")
    told = newer.get("activation_fn") if isinstance(newer, Mapping) else None
    told = told or config.get("sbert_ce_default_activation_function")
    return not str(told or "").endswith("Identity")


def use_of(text: TextModel) -> Use:
    told = text.vectors
    if told is None or told.writes:
        return "writes"
    return "embeds" if told.labels is None else "ranks"


def must_write(text: TextModel, model: str) -> None:
    """Raises Unsupported for models that only read."""
    told = text.vectors
    if told is not None and not told.writes:
        path = "/v1/embeddings" if told.labels is None else "/v1/rerank"
        raise Unsupported(f"the model {model!r} writes no text", hint=f"use {path}", param="model")


def room_of(text: TextModel) -> int:
    """Tokens that a text may have: engines of decoders keep a place for an answer."""
    is_decoder = text.vectors is None or not text.vectors.is_encoder
    return text.context_tokens - is_decoder


def limit_of(text: TextModel, told: int | None) -> int | None:
    """Where texts are to be cut; None = nowhere. -1 is as far as the model holds."""
    if told is None:
        return None
    room = room_of(text)
    if told == 0 or told > room:
        raise BadRequest(
            f"truncate_prompt_tokens: this model takes 1 to {room} tokens; -1 stands for {room}",
            param="truncate_prompt_tokens",
        )
    return room if told < 0 else told


def cut_text(text: TextModel, words: str, limit: int | None, *, add_special: bool) -> list[int]:
    """Token ids of one text, its beginning if it is longer than `limit`."""
    if limit is None:
        return text.encode(words, add_special=add_special)
    marks = text.tokenizer.num_special_tokens_to_add(False) if add_special else 0
    if limit <= marks:
        raise BadRequest(
            f"truncate_prompt_tokens: the tokenizer adds {marks} marks to a text, so {limit} are too few",
            param="truncate_prompt_tokens",
        )
    bare = _bare(text, words)
    bare.truncate(limit - marks)
    return list(text.tokenizer.post_process(bare, None, add_special).ids)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts as one prompt; `second_at` None where the model does not tell them apart."""

    ids: list[int]
    second_at: int | None


def cut_pair(text: TextModel, first: str, second: str, limit: int | None) -> Pair:
    """Both texts between the tokenizer's marks; the second is cut. Raises ContextTooLong if the first fills it all."""
    one, two = _bare(text, first), _bare(text, second)
    if limit is not None:
        room = limit - text.tokenizer.num_special_tokens_to_add(True) - len(one.ids)
        if room < 1:
            raise ContextTooLong(
                f"the query has {len(one.ids)} tokens, which leaves no room for a document in {limit}",
                hint="shorten the query",
                param="query",
            )
        two.truncate(room)
    both = text.tokenizer.post_process(one, two, True)
    second_at = both.type_ids.index(1) if 1 in both.type_ids else None
    return Pair(list(both.ids), second_at)


def _bare(text: TextModel, words: str) -> Encoding:
    try:
        return text.tokenizer.encode(words, add_special_tokens=False)
    except UnicodeEncodeError:
        raise BadRequest("the text holds half of a surrogate pair", param="input") from None


def check_room(text: TextModel, count: int, param: str) -> None:
    """Raises BadRequest for no tokens, ContextTooLong for too many."""
    room = room_of(text)
    if not count:
        raise BadRequest(f"{param}: a text needs at least one token", param=param)
    if count > room:
        raise ContextTooLong(
            f"this model reads at most {room} tokens of a text, but one has {count}",
            hint="shorten it, or have it cut: truncate_prompt_tokens = -1",
            param=param,
        )
