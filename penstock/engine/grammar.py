"""Grammars: what an answer must match, and which tokens may come next. llguidance does the parsing.

Why llguidance and not xgrammar: it computes masks lazily (a schema costs a millisecond to begin with, not seconds), and
its wheel of 3 MB needs neither torch nor triton, so that a gateway without an engine can check what it is sent.

    grammars = Grammars(tokenizer_json, num_tokens=4096, eos_ids=(0,))
    reason = grammars.fault(grammar)        # None, or what is wrong with it
    matcher = grammars.matcher(grammar)     # for one answer

White space between the parts of JSON is at most LONGEST_SPACE characters: models that are made to write JSON, small
ones above all, may otherwise write blanks until their tokens are used up.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from penstock.core.types import Grammar
from penstock.engine.folder import ModelFacts

LONGEST_SPACE = 16
MOST_KEPT = 256  # grammars
SPACE = {"whitespace_pattern": rf"[ \n\t]{{0,{LONGEST_SPACE}}}"}


class Grammars:
    """Compiled grammars of one tokenizer; what was used lately is kept. May be used by several threads."""

    def __init__(
        self, tokenizer: str, *, eos_ids: Sequence[int], num_tokens: int | None = None
    ) -> None:
        """`tokenizer`: the text of tokenizer.json. `num_tokens`: width of the logits, None = of the vocabulary."""
        self._tokenizer = LLTokenizer(tokenizer, n_vocab=num_tokens, eos_token=list(eos_ids))
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, folder: Path, *, eos_ids: Sequence[int], num_tokens: int | None = None
    ) -> Grammars:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return cls(text, eos_ids=eos_ids, num_tokens=num_tokens)

    def fault(self, grammar: Grammar) -> str | None:
        """Why nothing can be made of it; None when it is sound."""
        try:
            found = self._compiled(grammar)
        except ValueError as error:  # JSON that is none
            return str(error)
        return str(found.get_error()) if found.is_error() else None

    def matcher(self, grammar: Grammar) -> Matcher:
        """At the beginning of an answer. The grammar must be sound."""
        return Matcher(self._compiled(grammar).deep_copy(), self._tokenizer.vocab_size)

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        with self._lock:
            found = self._kept.get(grammar)
            if found is None:
                found = self._kept[grammar] = LLMatcher(self._tokenizer, _source(grammar))
                if len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(grammar)
        return found


def _source(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            return str(LLMatcher.grammar_from_json_schema(grammar.text, overrides=SPACE))  # type: ignore[arg-type]
        case "regex":
            return str(LLMatcher.grammar_from_regex(grammar.text))
        case "lark":
            return str(LLMatcher.grammar_from_lark(grammar.text))


class Matcher:
    """One answer's way through its grammar. `allowed` follows the answer, also where tokens were taken back."""

    def __init__(self, matcher: LLMatcher, num_tokens: int) -> None:
        self._matcher = matcher
        self._num_heard = 0
        self.num_tokens = num_tokens
        self._bits: NDArray[np.int32] = np.zeros((1, -(-num_tokens // 32)), np.int32)

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens may follow `output`, all tokens of the answer so far: [num_tokens]. None at all: see `fault`."""
        bits = np.unpackbits(self.allowed_bits(output).view(np.uint8), bitorder="little")
        return bits[: self.num_tokens].view(np.bool_)

    def allowed_bits(self, output: Sequence[int]) -> NDArray[np.int32]:
        """The same, token i as bit i % 32 of word i // 32. Good until the next call.

        An answer is followed token by token: from call to call, `output` has grown, or has lost some at its end.
        """
        self._follow(output)
        fill_next_token_bitmask(self._matcher, self._bits)
        bits: NDArray[np.int32] = self._bits[0]
        return bits

    def num_valid(self, output: Sequence[int], guesses: Sequence[int]) -> int:
        """How many of the guesses, from the first on, may follow `output`."""
        self._follow(output)
        return 0 if self._matcher.is_error() else int(self._matcher.validate_tokens(list(guesses)))

    def forget(self, count: int) -> None:
        """Of what it heard, all but the first `count` tokens: other ones come in their place."""
        if self._num_heard > count:
            self._matcher.rollback(self._num_heard - count)
            self._num_heard = count

    def _follow(self, output: Sequence[int]) -> None:
        if len(output) > self._num_heard:
            self._matcher.consume_tokens(list(output[self._num_heard :]))
            self._num_heard = len(output)
        else:
            self.forget(len(output))

    @property
    def fault(self) -> str | None:
        """Why the grammar can not be followed any further."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else None


def choice_of(texts: Sequence[str]) -> Grammar:
    """One of these texts."""
    options = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return Grammar(kind="lark", text=f"start: {options}")


def grammars_of(facts: ModelFacts) -> Callable[[], Grammars] | None:
    """The model's grammars, made when the first is asked for; None where the folder has no tokenizer.json."""
    if not (facts.folder / "tokenizer.json").is_file():
        return None
    return functools.cache(
        lambda: Grammars.load(facts.folder, eos_ids=facts.eos_ids, num_tokens=facts.vocab_size)
    )
