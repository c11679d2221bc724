"""Exchanges that are passed on: an HTTP call goes to a foreign server as it came, and its answer comes back as it was
written. Neither is turned into token ids, so nothing is lost that this version does not know of.

Such an exchange is a `Request` like any other to fleets, policies, logs and accounts. Its prompt is a
`ForwardedPrompt`: the size is an estimate, and its blocks are hashes of pieces of the prompt's own bytes, chained as
token blocks are: equal hashes mean equal beginnings, which is all that routing by prefix needs. Its Outputs carry
`data`, bytes of the answer: whole events of a stream, or the body; the last one has `finish`. The exchange stays in
the process that took it in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from msgspec import Struct

from penstock.core.prompt import HASH_BYTES, TokenPrompt, seed_hash
from penstock.core.types import BlockHash, Request

BYTES_PER_TOKEN = 4  # of English text; an estimate that orders prompts by size


class Usage(Struct, gc=False):
    """Tokens as the foreign server counted them; `is_counted` False: it told nothing, and events were counted."""

    num_prompt: int = 0
    num_output: int = 0
    num_cached: int = 0
    is_counted: bool = False


class Forward(Struct, gc=False):
    """The call: where to and with what body, and what was read off it. Who passes it on writes `usage`, before the last
    Output.

    `model` as the body has it. `takes_usage`: the caller asked for a stream's usage itself, so it is shown to it.
    `has_options`: the body has `stream_options`; `has_ours`: it has fields that only Penstock knows. `salt`: to be
    told the server as `cache_salt`, so that tenants share no cached prompts.
    """

    path: str
    body: bytes
    model: str | None = None
    is_stream: bool = False
    takes_usage: bool = False
    has_options: bool = False
    has_ours: bool = False
    salt: str | None = None
    usage: Usage | None = None


class ForwardedPrompt:
    """A prompt known by its bytes. `texts`: the JSON of what the prompt is made from, in the order of the prompt.

    `ids`: its tokens, where somebody knows the server's tokenizer; it is then hashed as the server's own blocks are.
    """

    __slots__ = ("forward", "num_tokens", "is_salted", "_told", "_seed", "_hashes", "_tokens")

    def __init__(
        self,
        forward: Forward,
        texts: Sequence[bytes],
        *,
        key: bytes = b"",
        salt: str = "",
        ids: Sequence[int] | None = None,
    ) -> None:
        self.forward, self.is_salted = forward, bool(salt)
        self._tokens = TokenPrompt(ids, key=key, salt=salt) if ids else None
        self._told = b"".join(texts)
        self._seed = seed_hash(key, None, salt)
        self.num_tokens = len(ids) if ids else max(1, len(self._told) // BYTES_PER_TOKEN)
        self._hashes: dict[int, tuple[BlockHash, ...]] = {}

    def blocks(self, size: int) -> tuple[BlockHash, ...]:
        if self._tokens is not None:
            return self._tokens.blocks(size)
        known = self._hashes.get(size)
        if known is None:
            known = self._hashes[size] = tuple(self._hash(size * BYTES_PER_TOKEN))
        return known

    def _hash(self, step: int) -> list[BlockHash]:
        parent, told, fresh = self._seed, memoryview(self._told), []
        for start in range(0, len(told) - step + 1, step):
            piece = told[start : start + step]
            digest = hashlib.blake2b(piece, digest_size=HASH_BYTES, key=parent).digest()
            parent = BlockHash(digest)
            fresh.append(parent)
        return fresh


def forward_of(request: Request) -> Forward | None:
    """The exchange that a request passes on; None for one of token ids."""
    return request.prompt.forward if isinstance(request.prompt, ForwardedPrompt) else None
