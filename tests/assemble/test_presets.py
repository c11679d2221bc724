"""Every preset runs a deployment as it is, and brings what it needs beside policies."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.assemble import load_config
from penstock.assemble.presets import HOST_BLOCKS, PRESETS
from penstock.core.errors import BadConfig
from penstock.core.events import Event, Transferred
from penstock.lab.simulate import simulate
from penstock.traffic import open_trace

TRACE = Path(__file__).parents[2] / "data" / "azure_2023_conv_200.csv"
MODELS = {"dllm-serve": "llada-8b"}
NUM = 12


class Copies:
    def __init__(self) -> None:
        self.num_blocks = 0

    def emit(self, event: Event) -> None:
        if isinstance(event, Transferred):
            self.num_blocks += event.num_blocks


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_serves_a_trace_in_virtual_time(preset: str) -> None:
    """Nothing but its name is given; memory is short, so that jobs are preempted."""
    model = MODELS.get(preset, "llama-3.1-8b")
    sets = [
        f"fleet.0.model={model}",
        "fleet.0.executor.gpu=a100-80g",
        f"fleet.0.policy.preset={preset}",
        "fleet.0.cache.num_blocks=280",
    ]
    copies = Copies()
    trace = open_trace(TRACE, limit=NUM, rate_per_s=40.0, model=model)
    found = simulate(load_config(sets=sets), trace, listeners=(copies,))
    assert found.figures.all.num_finished == NUM and not found.figures.errors
    assert (copies.num_blocks > 0) == (preset in HOST_BLOCKS)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["fleet.0.model=llama-3.1-8b", "fleet.0.policy.preset=dllm-serve"], "is none"),
        (["fleet.0.model=llada-8b"], "diffusion language model, which"),
        (
            [
                "fleet.0.model=llada-8b",
                "fleet.0.policy.preset=dllm-serve",
                "fleet.0.executor.tensor_parallel=2",
            ],
            "runs on one",
        ),
    ],
)
def test_diffusion_models_and_policies_go_together(sets: list[str], said: str) -> None:
    config = load_config(sets=["fleet.0.executor.gpu=l40s", *sets])
    with pytest.raises(BadConfig, match=said):
        simulate(config, open_trace(TRACE, limit=1, model=config.fleet[0].model))


def test_a_preset_brings_host_memory_unless_told_otherwise() -> None:
    def blocks(*sets: str) -> int:
        config = load_config(sets=["fleet.0.policy.preset=fast-switch", *sets])
        return config.fleet[0].cache.swap.host_blocks

    assert blocks() == HOST_BLOCKS["fast-switch"]
    assert blocks("fleet.0.cache.num_blocks=77") == 77
    assert blocks("fleet.0.cache.swap.mode=sync") == HOST_BLOCKS["fast-switch"]
    assert blocks("fleet.0.cache.swap.host_blocks=0") == 0
    assert blocks("fleet.0.executor.tensor_parallel=2") == 0
    assert blocks("fleet.0.executor.tensor_parallel=2", "fleet.0.executor.kind=modelled") > 0
    assert load_config(sets=["fleet.0.policy.preset=sglang"]).fleet[0].cache.swap.host_blocks == 0
