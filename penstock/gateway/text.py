"""A model's text: how it is cut into tokens and put together again, how a chat is laid out, where answers end.

Two rules about special tokens. A plain prompt is given what the tokenizer adds by itself (a begin mark, mostly); a
rendered chat already holds its marks, so nothing is added to it. Text that spells a special token is that token,
as in the reference implementations.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from penstock.core.errors import BadRequest
from penstock.engine.folder import read_json
from penstock.engine.grammar import Grammars
from penstock.engine.torch.diffusion.families import is_diffusion
from penstock.gateway.detokenize import (
    ByteDetokenizer,
    ByteTable,
    Detokenizer,
    WindowDetokenizer,
)
from penstock.gateway.folder import (
    Preferred,
    context_tokens,
    eos_ids,
    load_template,
    load_tokenizer,
    preferred,
)
from penstock.gateway.marks import MARKS, form_of, thinks
from penstock.gateway.template import ChatTemplate
from penstock.gateway.vectors import Vectors, vectors_of

LONG_CHARS = 4096
SPACE = "▁"  # sentencepiece's mark for a space


class TextModel:
    """Text of one model; shared by all its requests and, where it only reads, by threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context_tokens: int,
        eos_ids: frozenset[int] = frozenset(),
        template: ChatTemplate | None = None,
        preferred: Preferred = Preferred(),  # noqa: B008 - frozen
        is_canvas: bool = False,
        vectors: Vectors | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.eos_ids = eos_ids
        self.template = template
        self.preferred = preferred
        self.vectors = vectors
        source = "" if template is None else template.source
        self.call_form, self.does_think = form_of(source), thinks(source)
        special = tokenizer.get_added_tokens_decoder().items()
        self._special = {id: token.content for id, token in special if token.special}
        self._marks = frozenset(id for id, word in self._special.items() if word in MARKS)
        self.is_canvas = is_canvas  # a diffusion language model, which fills masks in any order
        self.num_vocabulary: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self._pieces = _token_bytes(tokenizer)
        self.longest_token = max(map(len, self._pieces), default=1) or 1
        self._table = ByteTable(self._shown()) if is_byte_level(tokenizer) else None

    @functools.cached_property
    def grammars(self) -> Grammars:
        """To check what callers want their answers to follow; made when the first asks. The model must have eos_ids."""
        return Grammars(self.tokenizer.to_str(), eos_ids=sorted(self.eos_ids))

    @classmethod
    def load(cls, folder: Path, *, max_context: int | None = None) -> TextModel:
        """From a model folder. `max_context` narrows what config.json allows. Raises BadModel."""
        config = read_json(folder / "config.json")
        tokenizer = load_tokenizer(folder)
        vectors = vectors_of(folder, config)
        context = context_tokens(folder)
        if vectors is not None and vectors.context_tokens is not None:
            context = min(context, vectors.context_tokens)
        wanted, is_canvas = preferred(folder), is_diffusion(config)
        return cls(
            tokenizer,
            context_tokens=context if max_context is None else min(context, max_context),
            eos_ids=eos_ids(folder, tokenizer),
            template=load_template(folder),
            preferred=Preferred(temperature=wanted.temperature) if is_canvas else wanted,
            is_canvas=is_canvas,
            vectors=vectors,
        )

    def _shown(self) -> list[bytes]:
        """Bytes of each token, none for special ones: they are never shown, but for marks of thoughts and calls."""
        hidden = self._special.keys() - self._marks
        return [b"" if id in hidden else piece for id, piece in enumerate(self._pieces)]

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids. Of the two calls the one for batches starts threads, but alone lets others run meanwhile."""
        try:
            if len(text) < LONG_CHARS:
                return list(self.tokenizer.encode(text, add_special_tokens=add_special).ids)
            (encoding,) = self.tokenizer.encode_batch([text], add_special_tokens=add_special)
        except UnicodeEncodeError:
            raise BadRequest("the text holds half of a surrogate pair", param="prompt") from None
        return list(encoding.ids)

    def is_surely_longer(self, text: str, tokens: int) -> bool:
        """Whether `text` must exceed `tokens` even if every token were the longest one; cheap."""
        return len(text) > tokens * self.longest_token

    def decode(self, ids: Sequence[int]) -> str:
        marked = [place for place, id in enumerate(ids) if id in self._marks] if self._marks else []
        if not marked:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        place = marked[0]
        return self.decode(ids[:place]) + self._special[ids[place]] + self.decode(ids[place + 1 :])

    def special_id(self, word: str) -> int | None:
        """The special token that is spelt so."""
        return next((id for id, spelt in self._special.items() if spelt == word), None)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat as prompt text. Raises BadRequest when the model has no template or it refuses."""
        if self.template is None:
            raise BadRequest(
                "this model has no chat template, so it cannot answer chats",
                hint="use /v1/completions, or add chat_template.jinja to the model's folder",
                param="messages",
            )
        return self.template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, extras=extras
        )

    def detokenizer(self, before: Sequence[int] = ()) -> Detokenizer:
        """For one answer; `before` are the ids of a text that the answer continues."""
        if self._table is not None:
            return ByteDetokenizer(self._table)
        return WindowDetokenizer(self.decode, before)

    def token_bytes(self, id: int) -> bytes:
        """What a token says by itself, special ones by their name; empty for ids outside the vocabulary."""
        return self._pieces[id] if 0 <= id < len(self._pieces) else b""


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether decoding is a plain concatenation of each token's bytes."""
    decoder = msgspec.json.decode(tokenizer.to_str()).get("decoder") or {}
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    return bool(parts) and all(part.get("type") == "ByteLevel" for part in parts)


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of bytes in byte-level vocabularies: printable Latin-1 is itself, the rest follows
    from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    if is_byte_level(tokenizer):
        alphabet = _byte_alphabet()
        for token, id in vocabulary.items():
            known = all(char in alphabet for char in token)
            pieces[id] = bytes(alphabet[char] for char in token) if known else token.encode()
    else:
        for token, id in vocabulary.items():
            pieces[id] = _plain_bytes(token)
    return pieces


def _plain_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(SPACE, " ").encode()
