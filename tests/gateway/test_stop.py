"""Stop strings equal a naive search on the whole text, however it is cut into pieces."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.types import Output
from penstock.gateway.answer import AnswerText
from penstock.gateway.stop import StopFinder, Stops

WORDS = st.text("ab\n", max_size=30)
STRINGS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


def naive(text: str, strings: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; of several, the longest."""
    for end in range(1, len(text) + 1):
        ending = [s for s in strings if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@given(WORDS, STRINGS, st.lists(st.integers(0, 5), max_size=12))
@settings(max_examples=250, deadline=None)
def test_equals_a_naive_search(text: str, strings: list[str], sizes: list[int]) -> None:
    finder = StopFinder(Stops(strings))
    told = "".join(finder.push(piece) for piece in cut(text, sizes)) + finder.flush()
    assert (told, finder.hit is not None) == naive(text, strings)


@given(WORDS, STRINGS, st.lists(st.integers(0, 5), max_size=12))
@settings(max_examples=150, deadline=None)
def test_holds_back_no_more_than_it_must(text: str, strings: list[str], sizes: list[int]) -> None:
    finder = StopFinder(Stops(strings))
    read, told = "", ""
    for piece in cut(text, sizes):
        read, told = read + piece, told + finder.push(piece)
        if finder.hit is not None:
            return
        held = read[len(told) :]
        assert not held or any(s.startswith(held) and s != held for s in strings)
        longer = [read[start:] for start in range(len(told))]
        assert not any(s.startswith(end) for s in strings for end in longer)


class Letters:
    """A detokenizer whose ids are code points."""

    def push(self, ids: object) -> str:
        return "".join(map(chr, ids))  # type: ignore[call-overload]

    def flush(self) -> str:
        return ""


@given(WORDS.filter(bool), STRINGS, st.integers(1, 5), st.integers(0, 6))
@settings(max_examples=150, deadline=None)
def test_bundling_of_tokens_changes_nothing(
    text: str, strings: list[str], size: int, min_tokens: int
) -> None:
    """Text, count of tokens and reason are those of one token at a time; the first `min_tokens` are never searched."""

    def run(size: int) -> tuple[str, int, str | None]:
        answer = AnswerText(Letters(), stops=Stops(strings), min_tokens=min_tokens)
        told = ""
        for start in range(0, len(text), size):
            ids = tuple(map(ord, text[start : start + size]))
            is_last = start + size >= len(text)
            told += answer.push(Output(0, ids, len(ids), "length" if is_last else None))
        return told, answer.num_tokens, answer.finish

    told, count, finish = run(size)
    assert (told, count, finish) == run(1)
    expected, is_hit = naive(text[min_tokens:], strings)
    assert told == text[:min_tokens] + expected
    assert finish == ("stop" if is_hit else "length")


def test_a_stop_token_ends_the_text_before_itself() -> None:
    answer = AnswerText(Letters(), stop_ids=frozenset((ord("!"),)))
    assert answer.push(Output(0, (ord("a"), ord("!")), 2, "stop")) == "a"
    assert (answer.num_tokens, answer.stop_reason, answer.finish) == (2, ord("!"), "stop")
    assert answer.push(Output(0, (ord("b"),), 1)) == ""
