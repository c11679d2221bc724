"""What the experiments on prefill and decode apart ask for."""

from __future__ import annotations

import pytest

from penstock.cost.fitted import Fitted
from penstock.cost.linear_five import linear_five
from penstock.cost.step import features_of
from penstock.experiments import distserve, pd_serve
from penstock.lab.experiment import Row, Scale
from penstock.lab.placement import Asked, Judge, hardware, spec_of
from penstock.traffic.lengths import Fixed


def test_units_are_those_of_the_noted_runs() -> None:
    asked = Asked(lengths=Fixed(prompt=100, output=10), ttft_s=1, tpot_s=1, num=2)
    for model, apart, together in (("opt-13b", 4, 3), ("opt-66b", 9, 3)):
        judge = Judge(hardware=hardware(model, spec_of("a100-80g", "distserve")), asked=asked)
        assert len(distserve.units_of("disaggregated", model, judge)) == apart
        assert len(distserve.units_of("chunked", model, judge)) == together


def test_the_claim_is_won_only_with_equal_step_times() -> None:
    """Disaggregated twice as good as one engine's colocated plan, and no better than its own."""

    def row(variant: str, model: str, rate: float) -> Row:
        told = {f"rate {distserve.told_of(each)}": rate for each in distserve.SURFACE}
        settings = {"variant": variant, "workload": "conv", "model": model, "seed": 0}
        return Row(settings=settings, figures=told)

    rates = {"disaggregated": 1.0, "colocated, vLLM": 0.5, "colocated": 1.0, "chunked, paid": 0.9}
    rows = [row(name, model, rate) for model in distserve.DEVICES for name, rate in rates.items()]
    assert distserve.judge(rows).outcome == "not"
    rates["colocated"] = 0.8
    rows = [row(name, model, rate) for model in distserve.DEVICES for name, rate in rates.items()]
    assert "at least 1.2 somewhere with equal step times: yes" in distserve.judge(rows).why


@pytest.mark.parametrize("pieces", [[(0, 900, 1)], [(300, 1, 1)] * 40], ids=["prompt", "decodes"])
def test_the_profile_of_pd_serve_is_the_published_table(pieces: list[tuple[int, int, int]]) -> None:
    """Exact for a prompt; decodes share the prompts' constant, which is 1.8 ms below theirs."""
    fitted = Fitted(dict(pd_serve.step_terms()), name="", digest="", num_layers=32)
    told = linear_five("distserve", "opt-13b", 1, num_layers=40).seconds(features_of(pieces))
    less = 0.0 if len(pieces) == 1 else 19.934702624895458e-3 - 18.10254647486372e-3
    assert fitted.seconds(features_of(pieces)) == pytest.approx(told - less)


def test_bursts_are_as_uneven_as_the_code_trace() -> None:
    from penstock.traffic.arrivals import OnOff

    process = OnOff(
        on_rate_per_s=pd_serve.RATE / pd_serve.ON_SHARE,
        mean_on_s=pd_serve.MEAN_ON_S,
        mean_off_s=pd_serve.MEAN_ON_S * (1 / pd_serve.ON_SHARE - 1),
    )
    assert process.dispersion_at(60.0) == pytest.approx(pd_serve.DISPERSION, rel=0.02)
    assert process.mean_rate_per_s == pytest.approx(pd_serve.RATE)
    sent = pd_serve.burst(0.71, 300, 0, Scale())
    assert len(sent.rows) == 300 and all(output == 1 for _, _, output in sent.rows)
