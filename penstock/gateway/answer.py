"""One answer in progress: the service's Outputs become text that may be shown, and the reason it ended.

An answer is over when the service says so or when a stop string is found; later Outputs for it are ignored. Where
nobody asked for stop strings or logprobs a whole Output is decoded at once; else each token is looked at by itself,
so that counts and cuts do not depend on how tokens were bundled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from penstock.core.types import FinishReason, Output, TokenLogprob
from penstock.gateway.detokenize import Detokenizer
from penstock.gateway.stop import StopFinder, Stops


class Entry(NamedTuple):
    """A token's logprobs and where its text lies in the answer."""

    logprob: TokenLogprob
    start: int
    end: int


class AnswerText:
    """Reads Outputs with `push`; `told` counts characters already handed out."""

    __slots__ = (
        "_detokenizer",
        "_finder",
        "_stop_ids",
        "_min_tokens",
        "_wants_logprobs",
        "_entries",
        "_num_read",
        "num_tokens",
        "num_cached",
        "told",
        "finish",
        "stop_reason",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: Stops | None = None,
        stop_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        wants_logprobs: bool = False,
    ) -> None:
        self._detokenizer = detokenizer
        self._finder = StopFinder(stops) if stops else None
        self._stop_ids = stop_ids
        self._min_tokens = min_tokens
        self._wants_logprobs = wants_logprobs
        self._entries: deque[Entry] = deque()
        self._num_read = 0
        self.num_tokens = 0
        self.num_cached = 0
        self.told = 0
        self.finish: FinishReason | None = None
        self.stop_reason: str | int | None = None

    def push(self, output: Output) -> str:
        """Text that may be shown now; sets `finish` with the last of it."""
        if self.finish is not None:
            return ""
        ids: Sequence[int] = output.ids
        if output.finish == "stop" and ids and ids[-1] in self._stop_ids:
            self.stop_reason = ids[-1]
            ids = ids[:-1]
        if self._finder is None and not self._wants_logprobs:
            text = self._detokenizer.push(ids)
            self.num_tokens += output.num_tokens
        else:
            text = self._push_each(ids, output)
        if output.finish is not None and self.finish is None:
            text += self._end(output.finish)
        # Told with each output or with the last only, and this answer may end before that.
        if not self.num_cached:
            self.num_cached = output.num_cached
        self.told += len(text)
        return text

    def _push_each(self, ids: Sequence[int], output: Output) -> str:
        told: list[str] = []
        for place, id in enumerate(ids):
            fresh = self._detokenizer.push((id,))
            self.num_tokens += 1
            if output.logprobs:
                self._note(output.logprobs[place], fresh)
            self._num_read += len(fresh)
            told.append(self._pass_stops(fresh))
            if self.finish is not None:
                return "".join(told)
        self.num_tokens += output.num_tokens - len(ids)
        return "".join(told)

    def _note(self, logprob: TokenLogprob, fresh: str) -> None:
        if self._wants_logprobs:
            self._entries.append(Entry(logprob, self._num_read, self._num_read + len(fresh)))

    def _pass_stops(self, fresh: str) -> str:
        """Stop strings count only in text that comes after the `min_tokens` first tokens."""
        if self._finder is None or self.num_tokens <= self._min_tokens:
            return fresh
        text = self._finder.push(fresh)
        if self._finder.hit is not None:
            self.finish, self.stop_reason = "stop", self._finder.hit
        return text

    def _end(self, finish: FinishReason) -> str:
        tail = self._detokenizer.flush()
        self._num_read += len(tail)
        if self._finder is not None:
            tail = self._finder.push(tail) + self._finder.flush()
            if self._finder.hit is not None:
                self.stop_reason = self._finder.hit
                finish = "stop"
        self.finish = finish
        return tail

    def take_entries(self) -> list[Entry]:
        """Logprobs of the tokens whose text has been told; at the end, of all that belong to the answer."""
        entries: list[Entry] = []
        was_cut = self.finish is not None and isinstance(self.stop_reason, str)
        while self._entries:
            first = self._entries[0]
            if first.end > self.told and (
                self.finish is None or was_cut and first.start >= self.told
            ):
                break
            entries.append(self._entries.popleft())
        return entries
