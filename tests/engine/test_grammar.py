"""Grammars against what nobody here wrote: Python's `json` and `re`, over random walks through the allowed tokens."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from penstock.core.types import Grammar
from penstock.engine.folder import DEFAULT_FOLDER
from penstock.engine.grammar import Grammars, choice_of

EOS = 1
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["a", "b c", 'd"e']},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
OBJECT = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
REGEX = r"[ab]{2,5}-(x|yz)+é?"


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars.load(DEFAULT_FOLDER, eos_ids=(0, EOS), num_tokens=4100)


def walk(grammars: Grammars, grammar: Grammar, seed: int, most: int = 200) -> list[int]:
    """Tokens of a random answer, its end token included; ends are taken as soon as they are allowed."""
    matcher, drawn, ids = grammars.matcher(grammar), np.random.default_rng(seed), list[int]()
    while len(ids) < most:
        allowed = matcher.allowed(ids)
        assert allowed.shape == (4100,) and allowed.any()
        ids.append(EOS if allowed[EOS] else int(drawn.choice(np.flatnonzero(allowed))))
        if ids[-1] == EOS:
            return ids
    return ids


def text_of(grammars: Grammars, ids: list[int]) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(DEFAULT_FOLDER / "tokenizer.json")).decode(ids[:-1]))


@pytest.mark.parametrize("seed", range(6))
def test_a_schema_is_kept(grammars: Grammars, seed: int) -> None:
    ids = walk(grammars, OBJECT, seed)
    assert ids[-1] == EOS
    told = json.loads(text_of(grammars, ids))
    assert set(told) == {"name", "kind", "sizes"} and len(told["name"]) <= 8
    assert told["kind"] in SCHEMA["properties"]["kind"]["enum"]  # type: ignore[index]
    assert all(isinstance(size, int) and 0 <= size <= 9 for size in told["sizes"])


@pytest.mark.parametrize("seed", range(4))
def test_a_regular_expression_and_a_choice_are_kept(grammars: Grammars, seed: int) -> None:
    ids = walk(grammars, Grammar(kind="regex", text=REGEX), seed)
    assert re.fullmatch(REGEX, text_of(grammars, ids))
    options = ["yes", "no way", 'say "é"\n']
    assert text_of(grammars, walk(grammars, choice_of(options), seed)) in options


def test_all_ends_are_allowed_where_one_is(grammars: Grammars) -> None:
    matcher, ids = grammars.matcher(choice_of(["x"])), walk(grammars, choice_of(["x"]), 0)
    allowed = matcher.allowed(ids[:-1])
    assert set(np.flatnonzero(allowed).tolist()) == {0, EOS}


def test_an_answer_may_lose_its_last_tokens_and_go_on_otherwise(grammars: Grammars) -> None:
    """What a plan that is aborted leaves behind: the same masks as if it had never been."""
    drawn, ids = np.random.default_rng(3), list[int]()
    followed = grammars.matcher(OBJECT)
    for _ in range(150):
        allowed = followed.allowed(ids)
        assert np.array_equal(allowed, grammars.matcher(OBJECT).allowed(ids))
        choices = np.flatnonzero(allowed)
        choices = choices[choices > EOS]
        if not len(choices) or (ids and drawn.random() < 0.3):
            del ids[-int(drawn.integers(1, min(3, len(ids)) + 1)) :]
        else:
            ids.append(int(drawn.choice(choices)))


@pytest.mark.parametrize(
    ("grammar", "told"),
    [
        (Grammar(kind="json_schema", text='{"type": "objekt"}'), "objekt"),
        (Grammar(kind="json_schema", text='{"$ref": "#/nowhere"}'), "nowhere"),
        (Grammar(kind="json_schema", text="{"), ""),
        (Grammar(kind="regex", text="(a"), "unclosed"),
        (Grammar(kind="lark", text="start: nothing"), "nothing"),
    ],
)
def test_what_cannot_be_followed_is_said(grammars: Grammars, grammar: Grammar, told: str) -> None:
    fault = grammars.fault(grammar)
    assert fault and told in fault


def test_sound_grammars_have_no_fault(grammars: Grammars) -> None:
    for grammar in (OBJECT, choice_of(["a"]), Grammar(kind="regex", text=REGEX)):
        assert grammars.fault(grammar) is None
