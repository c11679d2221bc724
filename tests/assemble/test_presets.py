"""Every preset runs a deployment as it is, and brings what it needs beside policies."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.assemble import load_config
from penstock.assemble.presets import HOST_BLOCKS, PRESETS
from penstock.core.events import Event, Transferred
from penstock.lab.simulate import simulate
from penstock.traffic import open_trace

TRACE = Path(__file__).parents[2] / "data" / "azure_2023_conv_200.csv"
ELSEWHERE = {"dllm-serve"}  # canvases are simulated by lab.canvases, not by a deployment
NUM = 12


class Copies:
    def __init__(self) -> None:
        self.num_blocks = 0

    def emit(self, event: Event) -> None:
        if isinstance(event, Transferred):
            self.num_blocks += event.num_blocks


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - ELSEWHERE))
def test_every_preset_serves_a_trace_in_virtual_time(preset: str) -> None:
    """Nothing but its name is given; memory is short, so that jobs are preempted."""
    sets = [
        "fleet.0.model=llama-3.1-8b",
        "fleet.0.executor.gpu=a100-80g",
        f"fleet.0.policy.preset={preset}",
        "fleet.0.cache.num_blocks=280",
    ]
    copies = Copies()
    trace = open_trace(TRACE, limit=NUM, rate_per_s=40.0, model="llama-3.1-8b")
    found = simulate(load_config(sets=sets), trace, listeners=(copies,))
    assert found.figures.all.num_finished == NUM and not found.figures.errors
    assert (copies.num_blocks > 0) == (preset in HOST_BLOCKS)


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
