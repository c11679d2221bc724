"""The tree of errors is the one drawn in its docstring, and schema versions are checked."""

from __future__ import annotations

import re

import pytest

from penstock.core import errors
from penstock.core.errors import PenstockError, SchemaMismatch
from penstock.core.schema import check_schema
from penstock.core.types import SCHEMA, Request, RequestId, Sampling, Slo


def test_the_drawing_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"[|`]- (\w+) +(\w+), (\w+)", errors.__doc__))
    real = {
        (name, found.fault, found.retry)
        for name, found in vars(errors).items()
        if isinstance(found, type)
        and issubclass(found, PenstockError)
        and found is not PenstockError
    }
    assert drawn == real


def test_an_unknown_schema_is_refused() -> None:
    check_schema("a log", SCHEMA)
    with pytest.raises(SchemaMismatch, match="a log has schema version 99") as caught:
        check_schema("a log", 99)
    assert caught.value.hint


def test_words_refuse_what_they_cannot_mean() -> None:
    from penstock.core.prompt import TracedPrompt

    with pytest.raises(ValueError, match="slo.ttft_s"):
        Slo(ttft_s=0)
    with pytest.raises(ValueError, match="empty"):
        Request(id=RequestId("r"), model="m", prompt=TracedPrompt(0))
    with pytest.raises(ValueError, match="max_tokens"):
        Request(
            id=RequestId("r"), model="m", prompt=TracedPrompt(1), sampling=Sampling(max_tokens=0)
        )
