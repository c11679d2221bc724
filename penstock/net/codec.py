"""Messages as bytes: one frame is `schema major (1 byte) | length of the kind (1 byte) | kind | msgpack body`.

A codec is made from the message types it may carry, so it frames without knowing what they mean. A frame of another
schema major is refused before its body is read; an unknown kind or a malformed body is a BrokenFrame. Prompts travel
as what they are: ids with what keys their hashes, or counts with hashes; a prompt hashes again where it arrives.
"""

from __future__ import annotations

import struct
import typing
from collections.abc import Callable, Iterable
from dataclasses import fields

import msgspec
import msgspec.structs

from penstock.core.errors import PenstockError
from penstock.core.prompt import HashedPrompt, TokenPrompt, TracedPrompt
from penstock.core.schema import check_schema
from penstock.core.types import SCHEMA, BlockHash, Part, Prompt


class BrokenFrame(PenstockError):
    """Bytes that no codec with these message types has written."""


class _Ids(msgspec.Struct, tag="ids", array_like=True):
    ids: tuple[int, ...]
    key: bytes
    adapter: str | None
    salt: str
    parts: tuple[Part, ...]


class _Traced(msgspec.Struct, tag="traced", array_like=True):
    num_tokens: int
    hash_ids: tuple[int, ...]
    traced_size: int
    salt: str


class _Hashed(msgspec.Struct, tag="hashed", array_like=True):
    num_tokens: int
    hashes: tuple[bytes, ...]
    size: int


def _pack_prompt(prompt: object) -> object:
    if isinstance(prompt, TokenPrompt):
        return _Ids(prompt.ids, prompt.key, prompt.adapter, prompt.salt, prompt.parts)
    if isinstance(prompt, TracedPrompt):
        return _Traced(prompt.num_tokens, prompt.hash_ids, prompt.traced_size, prompt.salt)
    if isinstance(prompt, HashedPrompt):
        return _Hashed(prompt.num_tokens, tuple(prompt.hashes), prompt.size)
    raise NotImplementedError(f"{type(prompt).__name__} has no form on the wire")


def _unpack_prompt(kind: type, packed: object) -> object:
    if kind is not Prompt:
        raise NotImplementedError(f"{kind} has no form on the wire")
    told = msgspec.convert(packed, _Ids | _Traced | _Hashed)
    if isinstance(told, _Ids):
        return TokenPrompt(
            told.ids, key=told.key, adapter=told.adapter, salt=told.salt, parts=told.parts
        )
    if isinstance(told, _Traced):
        return TracedPrompt(told.num_tokens, told.hash_ids, told.traced_size, told.salt)
    return HashedPrompt(told.num_tokens, tuple(map(BlockHash, told.hashes)), told.size)


def kind_of(message_type: type) -> str:
    """The name a message type goes by: the default of its field `kind`."""
    is_struct = issubclass(message_type, msgspec.Struct)
    for field in msgspec.structs.fields(message_type) if is_struct else fields(message_type):
        if field.name == "kind":
            return str(field.default)
    raise TypeError(f"{message_type.__name__} has no field `kind`")


class Codec:
    """Encodes and decodes messages of the given types (or of a union of them)."""

    def __init__(self, messages: object) -> None:
        types: Iterable[type] = typing.get_args(messages) or (typing.cast(type, messages),)
        self._encode = msgspec.msgpack.Encoder(enc_hook=_pack_prompt).encode
        self._heads: dict[type, bytes] = {}
        self._decoders: dict[bytes, Callable[[memoryview], object]] = {}
        for each in types:
            kind = kind_of(each).encode()
            self._heads[each] = struct.pack("BB", SCHEMA, len(kind)) + kind
            self._decoders[kind] = msgspec.msgpack.Decoder(each, dec_hook=_unpack_prompt).decode

    def encode(self, message: object) -> bytes:
        return self._heads[type(message)] + self._encode(message)

    def decode(self, frame: bytes) -> object:
        """The message in a frame. Raises SchemaMismatch or BrokenFrame."""
        if len(frame) < 2:
            raise BrokenFrame(f"a frame of {len(frame)} bytes")
        check_schema("a message", frame[0])
        end = 2 + frame[1]
        decode = self._decoders.get(frame[2:end])
        if decode is None:
            raise BrokenFrame(f"a message of an unknown kind {frame[2:end]!r}")
        try:
            return decode(memoryview(frame)[end:])
        except msgspec.DecodeError as error:
            raise BrokenFrame(
                f"a {frame[2:end].decode()} message that does not read: {error}"
            ) from None
