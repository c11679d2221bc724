"""Step times that DistServe published: the numbers, and how they add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.assemble import load_config
from penstock.cluster.predictors import step_model
from penstock.cluster.spec import ExecutorSpec
from penstock.core.errors import BadConfig
from penstock.cost.hardware import card_of, num_blocks
from penstock.cost.linear_five import LINEAR_CARD, degrees_of, linear_five, read_linear_five
from penstock.cost.shapes import PRESETS
from penstock.cost.step import features_of

LAYERS = {"opt-13b": 40, "opt-66b": 64}


def model(engine: str = "distserve", name: str = "opt-13b", tp: int = 1):  # type: ignore[no-untyped-def]
    return linear_five(engine, name, tp, num_layers=LAYERS[name])


def test_a_prompt_of_1000_tokens_takes_what_the_published_formula_says() -> None:
    published_ms = 18.10254647 + 0.10191226 * 1000 + 7.1222643e-6 * 1000**2
    around_ms = 2 + 1e-4 * 1000
    assert model().seconds(features_of([(0, 1000, 1)])) == pytest.approx(
        1e-3 * (published_ms + around_ms), rel=1e-7
    )


@pytest.mark.parametrize(("jobs", "row"), [(94, "few"), (95, "many")])
def test_decodes_have_other_numbers_from_95_jobs_on(jobs: int, row: str) -> None:
    first, context, each = {
        "few": (19.9347026, 6.26935652e-4, 0.0385069774),
        "many": (7.16618895, 5.7980004e-4, 0.158310962),
    }[row]
    contexts = 500 * jobs
    want_ms = first + context * contexts + each * jobs + 2 + 1e-4 * contexts
    assert model().seconds(features_of([(499, 1, 1)] * jobs)) == pytest.approx(1e-3 * want_ms)


@given(st.integers(1, 1500), st.integers(2, 500))
def test_chunks_of_a_prompt_add_up_to_its_squares(start: int, tokens: int) -> None:
    """All that differs between one step and two is what every step takes, and what is held twice."""
    one, two = features_of([(0, start + tokens, 1)]), features_of([(start, tokens, 1)])
    first = features_of([(0, max(2, start), 1)])
    if start < 2:
        return
    found = model()
    constant = 1e-3 * (18.10254647486372 + 2)
    again = 1e-7 * start
    assert found.seconds(first) + found.seconds(two) == pytest.approx(
        found.seconds(one) + constant + again
    )


def test_a_step_of_both_kinds_costs_less_than_two_steps_and_more_than_each() -> None:
    prompt, decodes = (0, 700, 1), [(900, 1, 1)] * 20
    both = model().seconds(features_of([prompt, *decodes]))
    apart = model().seconds(features_of([prompt])) + model().seconds(features_of(decodes))
    assert max(model().seconds(features_of([prompt])), model().seconds(features_of(decodes))) < both
    assert both < apart


def test_runs_are_their_steps() -> None:
    features = features_of([(99, 1, 1), (250, 1, 1)])
    run = model().run_seconds(features, 5)
    assert run == [model().seconds(features.grown(step)) for step in range(5)]


def test_published_rows_are_of_the_card_that_executors_must_name() -> None:
    assert read_linear_five().card == LINEAR_CARD
    assert degrees_of("distserve", "opt-13b") == (1, 2, 4)
    assert degrees_of("vllm", "opt-66b") == (2, 4, 8)


def test_memory_left_beside_the_weights_is_near_what_was_measured() -> None:
    """max_num_tokens.csv of the publication: 66,144 positions on one card, 163,008 on two; 11,600 for 66B on two."""
    card = card_of("a100-80g")
    measured = {("opt-13b", 1): 66144, ("opt-13b", 2): 163008, ("opt-66b", 4): 78496}
    for (name, tp), tokens in measured.items():
        assert 16 * num_blocks(card, PRESETS[name], tp=tp) == pytest.approx(tokens, rel=0.12)


def test_executors_take_them_by_name_on_that_card_only() -> None:
    shape = PRESETS["opt-13b"]
    spec = ExecutorSpec(kind="modelled", gpu="a100-80g", tables="distserve", tensor_parallel=2)
    assert "distserve's opt-13b on 2 x a100-80g" in step_model(spec, shape).name
    with pytest.raises(BadConfig, match="not of h100"):
        step_model(ExecutorSpec(kind="modelled", gpu="h100", tables="distserve"), shape)
    with pytest.raises(BadConfig, match="nobody published steps of llama-3.1-8b"):
        step_model(
            ExecutorSpec(kind="modelled", gpu="a100-80g", tables="distserve-vllm"),
            PRESETS["llama-3.1-8b"],
        )
    load_config(
        model="opt-13b",
        flags={"fleet.0.executor": {"kind": "modelled", "gpu": "a100-80g", "tables": "distserve"}},
    )
