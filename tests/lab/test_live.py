"""The whole circle on this machine: serve a model, bench it, stop it, and replay every decision it took."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from pathlib import Path

import pytest

from penstock.core.types import Slo
from penstock.lab.bench import Bench, bench
from penstock.lab.replay import replay
from penstock.report.log import read_log
from penstock.report.metrics import Metrics

ROOT = Path(__file__).parents[2]
AZURE = ROOT / "data" / "azure_2023_conv_200.csv"
MODEL = ROOT / "penstock" / "engine" / "default_model" / "model.safetensors"


async def ready(process: asyncio.subprocess.Process) -> str:
    """The URL that a starting server says it answers at."""
    assert process.stdout is not None
    async with asyncio.timeout(100):
        while line := (await process.stdout.readline()).decode():
            if found := re.search(r"ready at (http://\S+?)/v1", line):
                return found[1]
    raise AssertionError("the server ended before it was ready")


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason="needs the default model")
@pytest.mark.parametrize("policy", ["vllm-v1", "sglang"])
async def test_a_served_run_replays_identically(policy: str, tmp_path: Path) -> None:
    flags = ("--port", "0", "--policy", policy, "--log", str(tmp_path))
    tight = ("--set", "fleet.0.cache.num_blocks=300")  # so that jobs are preempted
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "penstock", "serve", *flags, *tight, cwd=ROOT, stdout=-1
    )
    try:
        wanted = Bench(url=await ready(process), trace=AZURE, limit=40, speed=20, slo=Slo(ttft_s=5))
        found = await bench(wanted)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
    assert found.figures.all.num_finished == 40 and not found.figures.errors
    assert found.figures.all.output_tokens == found.driven.wanted_output
    assert found.figures.all.prompt_tokens == pytest.approx(found.driven.wanted_prompt, rel=0.001)
    served = Metrics().read(read_log(tmp_path / "default-0.jsonl")).figures().all
    if policy == "vllm-v1":  # the other one sets memory aside for answers
        assert served.num_preemptions > 0, "the memory was meant to be tight"
    assert served.output_tokens == found.driven.wanted_output + 1  # the probe's
    assert served.ttft_s.p50 is not None and found.figures.all.ttft_s.p50 is not None
    assert (
        served.ttft_s.p50 <= found.figures.all.ttft_s.p50
    )  # the client sees what the replica did, and the way to it
    outcomes = {outcome.who: outcome for outcome in await asyncio.to_thread(replay, tmp_path)}
    assert all(outcome.difference is None for outcome in outcomes.values()), outcomes
    assert outcomes["default-0"].num_decisions > 300
    assert outcomes["fleet-default"].num_decisions >= 40
