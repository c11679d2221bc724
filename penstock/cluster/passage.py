"""What is changed in an exchange that is passed on, and what is read off it: as little as the accounts need.

The body goes on as it came but for three things: the model's name where the server calls it otherwise, fields that
are ours and not the server's (`slo`, `program`), and `stream_options`, which a stream without its usage gets so that
tokens are counted by who made them. Where nothing but that is to be changed, bytes are put in and nothing is encoded
again.

The answer is cut into whole events, which go on as they came. Only where an event holds a usage it is decoded: its
counts are noted, and it is left out when the caller had not asked for one and it holds nothing else. A stream is
complete when it said [DONE]; one that ends without it was cut.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw, Struct

from penstock.core.forward import Forward, Usage

OURS = ("slo", "program")
WITH_USAGE = b'{"stream_options":{"include_usage":true},'
DONE = b"[DONE]"
LENGTH = re.compile(rb'"finish_reason":\s*"length"')
USAGE = b'"usage"'
TAIL_BYTES = 4096  # of what one read brought: how an answer ended and its usage stand at its end
_encode = msgspec.json.encode
_fields = msgspec.json.Decoder(dict[str, Raw]).decode


class _Details(Struct, gc=False):
    cached_tokens: int | None = None


class _Counts(Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None

    def usage(self) -> Usage:
        details = self.prompt_tokens_details
        cached = 0 if details is None else details.cached_tokens or 0
        prompt = self.prompt_tokens or 0
        output = self.completion_tokens
        if output is None:
            output = max(0, (self.total_tokens or prompt) - prompt)
        return Usage(prompt, output, cached, is_counted=True)


class _Finish(Struct, gc=False):
    finish_reason: str | None = None


class _Event(Struct, gc=False):
    choices: list[_Finish] | None = None
    usage: _Counts | None = None


_event = msgspec.json.Decoder(_Event).decode


def body_for(forward: Forward, theirs: str, *, adds_usage: bool) -> bytes:
    """The body as a server that calls the model `theirs` is to get it."""
    adds_usage = adds_usage and forward.is_stream and not forward.takes_usage
    is_same = forward.model == theirs and not forward.has_ours and forward.salt is None
    if is_same and not (adds_usage and forward.has_options):
        return _with_usage(forward.body) if adds_usage else forward.body
    fields: dict[str, object] = dict(_fields(forward.body))
    fields["model"] = theirs
    for name in OURS:
        fields.pop(name, None)
    if forward.salt is not None:
        fields["cache_salt"] = forward.salt
    if adds_usage:
        told = fields.get("stream_options")
        known = msgspec.json.decode(told) if isinstance(told, Raw) else None
        fields["stream_options"] = {**(known or {}), "include_usage": True}
    return _encode(fields)


def _last_end(data: bytes) -> int:
    """Where the last whole event ends; 0 when there is none."""
    plain = data.rfind(b"\n\n") + 2
    returned = data.rfind(b"\r\n\r\n") + 4 if b"\r" in data else 0
    return max(plain if plain > 1 else 0, returned if returned > 3 else 0)


def _with_usage(body: bytes) -> bytes:
    """A JSON object that has no stream_options, with them."""
    _, _, rest = body.partition(b"{")
    return WITH_USAGE + rest


class Renaming:
    """Gives answers the name that callers know the model by."""

    __slots__ = ("_find", "_say")

    def __init__(self, theirs: str, ours: str) -> None:
        self._find = re.compile(rb'("model":\s*)' + re.escape(_encode(theirs)))
        self._say = rb"\g<1>" + _encode(ours).replace(b"\\", rb"\\")

    def __call__(self, data: bytes) -> bytes:
        return self._find.sub(self._say, data)


class Passage:
    """One answer on its way back. `shows_usage`: the caller asked for it."""

    __slots__ = (
        "usage",
        "is_done",
        "is_length",
        "_shows_usage",
        "_rename",
        "_tail",
        "_before",
        "_num_events",
    )

    def __init__(self, *, shows_usage: bool, rename: Renaming | None = None) -> None:
        self.usage: Usage | None = None
        self.is_done = False
        self.is_length = False
        self._shows_usage = shows_usage
        self._rename = rename
        self._tail = b""
        self._before = b""
        self._num_events = 0

    def events(self, data: bytes) -> bytes:
        """The whole events that `data` completes."""
        if self._tail:
            data, self._tail = self._tail + data, b""
        if not data.endswith(b"\n\n"):
            end = _last_end(data)
            data, self._tail = data[:end], data[end:]
        return self._told(data)

    def rest(self) -> bytes:
        """What came after the last whole event: some servers leave the last line break out."""
        data, self._tail = self._tail, b""
        return self._told(data)

    def _told(self, data: bytes) -> bytes:
        self._num_events += data.count(b"\n") // 2  # a line and an empty one
        tail = data[-TAIL_BYTES:]
        if DONE in tail[-20:]:
            self.is_done = True
        self._before = (self._before + tail)[-TAIL_BYTES:]
        if self.is_done:  # how it ended may have come in a read before
            self.is_length = LENGTH.search(self._before) is not None
        place = tail.rfind(USAGE)
        if place >= 0 and tail[place + len(USAGE) : place + 12].replace(b" ", b"")[:2] == b":{":
            data = self._read_usage(data, len(data) - len(tail) + place)
        return data if self._rename is None else self._rename(data)

    def _read_usage(self, data: bytes, place: int) -> bytes:
        """Note the counts of the event at `place`; without the event where it is not to be shown."""
        mark = b"\r\n\r\n" if data.find(b"\r\n", place) >= 0 else b"\n\n"
        before, after = data.rfind(mark, 0, place), data.find(mark, place)
        start = 0 if before < 0 else before + len(mark)
        end = len(data) if after < 0 else after + len(mark)
        _, _, told = data[start:end].partition(b"data:")
        try:
            event = _event(told)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return data  # some other thing of that name
        if event.usage is None:
            return data
        self.usage = event.usage.usage()
        if event.choices or self._shows_usage:
            return data
        return data[:start] + data[end:]

    def keep(self, data: bytes) -> None:
        """A piece of a body that is no stream."""
        self._tail += data

    def whole(self) -> bytes:
        """The body, when all of it was kept."""
        body, self._tail = self._tail, b""
        try:
            told = _event(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return body
        if told.usage is not None:
            self.usage = told.usage.usage()
        choices = told.choices or ()
        self.is_length = any(choice.finish_reason == "length" for choice in choices)
        return body if self._rename is None else self._rename(body)

    def counted(self) -> Usage:
        """The server's counts, or the events that it sent (one a token, as most do, and the end mark)."""
        return self.usage or Usage(num_output=max(0, self._num_events - 1))
