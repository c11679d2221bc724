"""What is typed after --sweep and --compare, and the grid it comes to."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.assemble import Config, load_config
from penstock.assemble.presets import PRESETS, policy_tables
from penstock.core.errors import BadConfig
from penstock.lab.grid import grid, parse_axis, spots

EXAMPLE = Path(__file__).parents[2] / "examples" / "azure_a100.toml"
FIGURES = st.decimals(min_value=Decimal("0.01"), max_value=1000, places=2)


def written(number: Decimal) -> str:
    return f"{number.normalize():f}"


@given(low=FIGURES, step=FIGURES, num=st.integers(0, 60))
def test_a_range_holds_both_ends_and_every_step_exactly(
    low: Decimal, step: Decimal, num: int
) -> None:
    high = low + step * num
    axis = parse_axis(f"rate={low}:{high}:{step}")
    assert axis.values == tuple(written(low + step * i) for i in range(num + 1))
    short = parse_axis(f"rate={low}:{high - step / 2}:{step}") if num else None
    assert short is None or short.values == axis.values[:-1]


@given(st.lists(FIGURES, min_size=1, max_size=9, unique=True))
def test_a_list_holds_what_is_written(numbers: list[Decimal]) -> None:
    axis = parse_axis("rate=" + " , ".join(map(str, numbers)))
    assert [Decimal(value) for value in axis.values] == numbers


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_grid_is_the_product_and_no_point_comes_twice(sizes: list[int]) -> None:
    names = ("rate", "replicas", "policy.batch.max_tokens", "cache.num_blocks")
    axes = grid(
        [
            f"{name}={','.join(map(str, range(1, n + 1)))}"
            for name, n in zip(names, sizes, strict=False)
        ],
        [],
    )
    found = [each.values for each in spots(axes)]
    assert len(found) == len(set(found)) == math.prod(sizes)
    told = {frozenset((axis.name, value) for axis, value in each) for each in found}
    wanted = itertools.product(
        *([(n, str(i + 1)) for i in range(size)] for n, size in zip(names, sizes, strict=False))
    )
    assert told == {frozenset(each) for each in wanted}


def test_names_lead_where_they_say() -> None:
    for name, path in (
        ("rate", "rate"),
        ("replicas", "fleet.0.replicas"),
        ("policy.route", "fleet.0.policy.route"),
        ("fleet.1.replicas", "fleet.1.replicas"),
        ("net.latency_s", "net.latency_s"),
    ):
        assert parse_axis(f"{name}=1,2").path == path
    values = parse_axis('policy.order={name="edf", x=[1,2]},"a,b",fcfs').values
    assert values == ('{name="edf", x=[1,2]}', '"a,b"', "fcfs")
    assert parse_axis("executor.profile=/a:b:c,d").values == ("/a:b:c", "d")


@pytest.mark.parametrize(
    ("sweeps", "told"),
    [
        (["rate"], "has no '='"),
        (["=1,2"], "has no '='"),
        (["rate=4:1:1"], "goes nowhere"),
        (["rate=1:4:0"], "goes nowhere"),
        (["rate=1:4:-1"], "goes nowhere"),
        (["rate=1:4"], "is no range"),
        (["rate=1:nan:1"], "is no range"),
        (["rate=0:1:0.0000001"], "10,000,001 values"),
        (["rate=0,1"], "'0' is not"),
        (["rate=fast"], "'fast' is not"),
        (["rate=1,,2"], "a value is missing"),
        (["rate="], "a value is missing"),
        (["replicas=1,2,1"], "'1' is given twice"),
        (["rate=1,2,1.0"], "'1.0' is given twice"),
        (["replica=1,2"], "did you mean 'replicas'"),
        (["rate=1,2", "speed=1,2"], "rate and speed are several"),
        (["replicas=1,2", "fleet.0.replicas=3"], "is an axis already"),
        (["replicas=1:1000:1", "cache.num_blocks=1:1000:1"], "1,000,000 points"),
    ],
)
def test_what_cannot_be_meant_is_named(sweeps: list[str], told: str) -> None:
    with pytest.raises(BadConfig, match=told):
        grid(sweeps, [])


def policies(config: Config) -> dict[str, object]:
    return {
        slot: each["name"] for slot, each in policy_tables(config.fleet[0].policy, True).items()
    }


def varied(*sets: str, **axes: str) -> list[Config]:
    """The configurations of a grid over the example's, changed by `sets`."""
    base = load_config(EXAMPLE, sets=sets)
    found = grid([], [f"policy.{name}={values}" for name, values in axes.items()])
    return [load_config(EXAMPLE, sets=[*sets, *spot.sets(base)]) for spot in spots(found)]


def test_a_batch_policy_brings_what_its_preset_says_beside_it() -> None:
    """Even when the file writes every slot out, as --print-config does."""
    written_out = [f"fleet.0.policy.{slot}={name}" for slot, name in PRESETS["vllm-v1"].items()]
    for sets in ([], written_out):
        vllm, sglang = varied(*sets, batch="vllm,sglang")
        assert policies(vllm) == {**PRESETS["vllm-v1"], "route": "least", "limit": "fixed"}
        assert policies(sglang) == {**PRESETS["sglang"], "route": "least", "limit": "fixed"}


def test_the_files_own_batch_policy_keeps_its_parameters_and_others_do_not_inherit_them() -> None:
    own = "fleet.0.policy.batch.max_tokens=512"
    vllm, sglang = varied(own, batch="vllm,sglang")
    tables = [policy_tables(each.fleet[0].policy, True)["batch"] for each in (vllm, sglang)]
    assert tables == [{"name": "vllm-v1", "max_tokens": 512}, {"name": "sglang"}]


def test_a_table_gives_parameters_to_the_policy_that_it_names() -> None:
    small, sglang = varied(batch='{name="vllm-v1",max_tokens=512},{name="sglang",max_jobs=9}')
    tables = [policy_tables(each.fleet[0].policy, True)["batch"] for each in (small, sglang)]
    assert tables == [{"name": "vllm-v1", "max_tokens": 512}, {"name": "sglang", "max_jobs": 9}]
    assert policies(sglang)["evict"] == "retract" and policies(small)["evict"] == "recompute-last"


def test_parameters_are_swept_below_the_policy_whatever_the_order_of_the_flags() -> None:
    sets = ["fleet.0.policy.preset=sglang"]
    base = load_config(EXAMPLE, sets=sets)
    axes = grid(["policy.batch.max_tokens=256,512"], ["policy.batch=vllm"])
    found = [load_config(EXAMPLE, sets=[*sets, *spot.sets(base)]) for spot in spots(axes)]
    tables = [policy_tables(each.fleet[0].policy, True)["batch"] for each in found]
    assert tables == [{"name": "vllm-v1", "max_tokens": size} for size in (256, 512)]
