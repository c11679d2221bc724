"""Step models: hand-computed rooflines, runs equal to single steps, fits that recover what made the data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import BadConfig, SchemaMismatch
from penstock.core.plans import Work
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Job, Request, RequestId
from penstock.core.views import Chunk
from penstock.cost.fitted import TERMS, Fitted, fit_steps, solve_nonnegative
from penstock.cost.hardware import card_of
from penstock.cost.predict import StepPredictor
from penstock.cost.profile import Profile, SchedulerCost, describe_machine, load_profile
from penstock.cost.roofline import Host, Roofline
from penstock.cost.shapes import shape_of
from penstock.cost.step import StepFeatures, StepModel, features_of, layer_segments

LLAMA = shape_of("llama-3.1-8b")
A100 = card_of("a100-80g")
LAYER = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336  # weights of one layer
HEAD = 128256 * 4096
FITTED = Fitted(
    {"step": 0.01, "token": 1e-4, "decode_context": 1e-7, "prefill_pairs": 1e-9},
    name="f",
    digest="0",
    num_layers=32,
)


def test_a_fit_knows_what_it_was_told() -> None:
    """Bytes and flops are the shape's, energy needs watts; what is not known is None, never 0."""
    step = features_of([(1000, 1, True), (0, 64, True)])
    blind = FITTED.step(step)
    assert (blind.energy_j, blind.num_bytes, blind.flops) == (None, None, None)
    told = Fitted({"step": 0.01}, name="f", digest="0", num_layers=32, watts=300.0, shape=LLAMA)
    found, other = told.step(step), Roofline(LLAMA, A100).step(step)
    assert found.energy_j == pytest.approx(3.0)
    assert (found.num_bytes, found.flops) == (other.num_bytes, other.flops)


pieces = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(1, 300), st.booleans()), min_size=1, max_size=12
)


def test_features_by_hand() -> None:
    found = features_of([(10, 1, True), (4, 1, True), (100, 3, False), (0, 2, True)])
    assert found == StepFeatures(
        num_tokens=7, num_jobs=4, num_samples=3, num_decodes=2, decode_context=11 + 5,
        max_decode_context=11, num_prefills=2,
        prefill_pairs=(101 + 102 + 103) + (1 + 2), prefill_context=103 + 2,
    )  # fmt: skip


def test_decode_step_of_llama_8b_on_a100_by_hand() -> None:
    """32 decodes at 1,000 positions each: every product is bound by memory."""
    layers = 32 * LAYER * 2 / (2.04e12 * 0.70)
    head = HEAD * 2 / (2.04e12 * 0.70)
    attention = 32 * 1000 * 131072 / (2.04e12 * 0.77) + 32 * 12e-6
    elementwise = 32 * 32 * (8 * 4096 + 3 * 14336) * 2 / 2.04e12
    host = 32 * 8 * 3e-6 + 32 * 15e-6
    features = features_of([(999, 1, True)] * 32)
    found = Roofline(LLAMA, A100).step(features)
    assert found.time_s == pytest.approx(layers + head + attention + elementwise + host, rel=1e-12)
    assert found.time_s == pytest.approx(sum(part for _, part in found.breakdown), rel=1e-12)
    assert found.flops == 2 * 32 * (32 * LAYER + HEAD) + 4 * 32 * 128 * 32 * 32 * 1000
    assert found.num_bytes == 2 * (32 * LAYER + HEAD) + 131072 * (32 * 1000 + 32)
    assert found.energy_j is not None and 0 < found.energy_j <= 400 * found.time_s


def test_prefill_step_of_llama_8b_on_a100_by_hand() -> None:
    """A prompt of 2,048: products are bound by arithmetic, attention works at the measured 40 % of its peak."""
    layers = 32 * 2 * 2048 * LAYER / (312e12 * 0.88)
    head = HEAD * 2 / (2.04e12 * 0.70)
    pairs = 2048 * 2049 // 2
    size = (2 * pairs) ** 0.5  # a hair above 2048: on the line to the next point
    mfu = 0.40 + (0.56 - 0.40) * (size - 2048) / (8192 - 2048)
    attention = 4 * 32 * 128 * 32 * pairs / (312e12 * mfu) + 32 * 12e-6
    elementwise = 2048 * 32 * (8 * 4096 + 3 * 14336) * 2 / 2.04e12
    host = 32 * 8 * 3e-6 + 15e-6
    found = Roofline(LLAMA, A100).seconds(features_of([(0, 2048, True)]))
    assert found == pytest.approx(layers + head + attention + elementwise + host, rel=1e-12)


def test_tensor_parallel_divides_work_and_adds_all_reduces() -> None:
    big = shape_of("llama-3.1-70b")
    step = features_of([(999, 1, True)] * 8)
    quiet = Host(launch_s=0.0, per_job_s=0.0)
    parts = dict(Roofline(big, A100, tp=4, host=quiet).step(step).breakdown)
    assert parts["layers"] == pytest.approx(80 * big.layer_params * 2 / (4 * 2.04e12 * 0.70))
    reduced = 8 * 8192 * 2
    assert parts["all-reduce"] == pytest.approx(2 * 80 * (15e-6 + 1.5 * reduced / 217e9))
    with pytest.raises(BadConfig):
        Roofline(big, card_of("l4"), tp=2)


def test_a_smaller_share_slows_arithmetic_at_once_and_memory_below_two_fifths() -> None:
    model = Roofline(LLAMA, A100, host=Host(launch_s=0.0, per_job_s=0.0))
    decode, prefill = features_of([(999, 1, True)]), features_of([(0, 4096, False)])
    assert model.seconds(decode, 0.5) == model.seconds(decode, 1.0)
    assert model.seconds(decode, 0.2) > 1.8 * model.seconds(decode, 1.0)
    assert model.seconds(prefill, 0.5) > 1.8 * model.seconds(prefill, 1.0)


@settings(deadline=None)
@given(
    contexts=st.lists(st.integers(0, 100_000), min_size=1, max_size=64),
    count=st.integers(1, 200),
    share=st.sampled_from([1.0, 0.7, 0.3]),
    model=st.sampled_from([Roofline(LLAMA, A100), FITTED]),
)
def test_a_run_costs_what_its_steps_cost_bit_for_bit(
    contexts: list[int], count: int, share: float, model: StepModel
) -> None:
    features = features_of([(start, 1, True) for start in contexts])
    run = model.run_seconds(features, count, share)
    assert run == [model.seconds(features.grown(i), share) for i in range(count)]
    later = features_of([(start + count, 1, True) for start in contexts])
    assert later == features.grown(count)


USED = Roofline(shape_of("mixtral-8x7b"), A100)


@given(pieces, st.sampled_from([1.0, 0.3]), st.sampled_from([None, 5]))
def test_a_roofline_remembers_nothing_wrong(
    found: list[tuple[int, int, bool]], share: float, layers: int | None
) -> None:
    """One that has priced many steps prices this one as a new one does, and as its parts add up."""
    step = features_of(found, layers)
    seconds = USED.seconds(step, share)
    assert seconds == Roofline(USED.shape, A100).seconds(step, share)
    assert seconds == pytest.approx(sum(part for _, part in USED.step(step, share).breakdown))


@given(pieces)
def test_more_work_never_takes_less_time(found: list[tuple[int, int, bool]]) -> None:
    for model in (Roofline(LLAMA, A100), FITTED):
        less, more = features_of(found[:-1] or found), features_of(found)
        assert model.seconds(less) <= model.seconds(more) * (1 + 1e-9)


def test_layer_segments_add_up_to_the_whole_model() -> None:
    work = [Work(0, 500, 1, True), Work(1, 0, 256, True)]
    whole = layer_segments(work, 32)
    assert whole == [features_of([(500, 1, True), (0, 256, True)], 32)]
    split = layer_segments([work[0], work[1]._replace(layers=(8, 24), samples=False)], 32)
    assert [(one.layers, one.num_tokens, one.num_samples) for one in split] == [
        (8, 1, 0), (16, 257, 0), (8, 1, 1),
    ]  # fmt: skip
    for model in (Roofline(LLAMA, A100), FITTED):
        parts = sum(model.seconds(one) for one in layer_segments([work[0]] * 3, 32))
        assert parts == pytest.approx(model.seconds(features_of([(500, 1, True)] * 3)))


def test_predictions_look_through_chunks() -> None:
    prompt = TracedPrompt(300)
    job = Job(
        seq=0, request=Request(id=RequestId("r"), model="m", prompt=prompt), answer=0, arrived_at=0.0,
        hashes=[], num_prompt=300, max_tokens=10, computed=100,
    )  # fmt: skip
    model = Roofline(LLAMA, A100)
    predictor = StepPredictor(model, LLAMA.layers)
    assert predictor.predict([]) == 0
    assert predictor.predict([Chunk(job, 50)]) == model.seconds(features_of([(100, 50, False)]))
    assert predictor.predict([Chunk(job, 200)]) == model.seconds(features_of([(100, 200, True)]))
    half = predictor.predict([Chunk(job, 50, layers=(0, 16))])
    assert half == pytest.approx(predictor.predict([Chunk(job, 50)]) / 2, rel=0.01)


def grid() -> list[StepFeatures]:
    prefills = [[(start, size, size != 33)] for size in (8, 33, 128, 500) for start in (0, 64, 300)]
    decodes = [[(at, 1, True)] * num for num in (1, 2, 5, 9, 30, 70) for at in (10, 200, 900)]
    mixed = [decode + prefill for decode, prefill in zip(decodes, prefills, strict=False)]
    return [features_of(one) for one in prefills + decodes + mixed]


def test_a_fit_recovers_the_coefficients_that_made_the_data() -> None:
    true = {
        "step": 2e-3, "token": 1e-4, "token_past_64": 5e-5, "decode_context": 3e-8, "prefill_pairs": 4e-9,
        "sample": 2e-5,
    }  # fmt: skip
    seconds = [sum(true[key] * TERMS[key](one) for key in true) for one in grid()]
    fit = fit_steps(grid(), seconds)
    assert fit.mape < 1e-6 and fit.left_out < 1e-6
    for key, value in true.items():
        assert fit.coefficients[key] == pytest.approx(value, rel=1e-3), key


def test_a_noisy_fit_states_its_error_and_stays_positive() -> None:
    noise = np.random.default_rng(1).normal(1, 0.05, len(grid()))
    exact = [1e-3 + 1e-4 * one.num_tokens for one in grid()]
    fit = fit_steps(grid(), list(exact * noise))
    assert 0.01 < fit.mape <= fit.left_out < 0.15
    assert all(value >= 0 for value in fit.coefficients.values())
    with pytest.raises(ValueError, match=f"needs {2 * len(TERMS)} steps"):
        fit_steps(grid()[:5], exact[:5])


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_nonnegative_least_squares_meets_its_optimality_conditions(seed: int) -> None:
    """Karush-Kuhn-Tucker: x >= 0, gradient >= 0, and one of the two is 0 in each place."""
    draw = np.random.default_rng(seed)
    matrix, target = draw.normal(size=(12, 6)), draw.normal(size=12)
    x = solve_nonnegative(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    assert (x >= 0).all() and (gradient >= -1e-7).all()
    assert np.abs(x * gradient).max() < 1e-7


def profile() -> Profile:
    return Profile(
        machine=describe_machine({"device": "cpu"}), model="tiny", num_layers=4, made_on="2026-01-01",
        steps={"step": 1e-3, "token": 1e-5}, num_steps=50, mape=0.02, left_out=0.03,
        scheduler=SchedulerCost(fixed_s=1e-4, per_running_s=2e-6, per_waiting_s=1e-6, num_steps=9),
    )  # fmt: skip


def test_a_profile_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profile.json"
    profile().save(path)
    found = load_profile(path)
    assert found == profile() and found.digest == profile().digest
    model = found.step_model()
    assert model.digest == found.digest and "tiny on cpu" in model.name
    assert model.seconds(features_of([(0, 10, True)])) == pytest.approx(1e-3 + 1e-4)
    assert found.scheduler is not None
    assert found.scheduler.seconds(10, 100) == pytest.approx(1e-4 + 2e-5 + 1e-4)


def test_bad_profiles_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(BadConfig, match="there is no profile"):
        load_profile(path)
    profile().save(path)
    table = json.loads(path.read_text())

    def rewritten(**change: object) -> Path:
        path.write_text(json.dumps({**table, **change}))
        return path

    with pytest.raises(BadConfig, match="changed by hand"):
        load_profile(rewritten(num_steps=51))
    with pytest.raises(SchemaMismatch):
        load_profile(rewritten(schema=99))
    with pytest.raises(BadConfig, match="unknown terms magic"):
        load_profile(rewritten(steps={"magic": 1.0}))
    with pytest.raises(BadConfig, match="mode1'; did you mean 'model'"):
        load_profile(rewritten(mode1="x"))
    path.write_text("{")
    with pytest.raises(BadConfig, match="not valid JSON"):
        load_profile(path)
