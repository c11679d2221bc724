"""Try two batch policies on real traffic before buying anything: 200 Azure requests, one modelled A100.

Run it with `python examples/compare_policies.py`. Nothing here ran on an A100: times come from a roofline.
"""

from pathlib import Path

from penstock.assemble import load_config
from penstock.lab.simulate import simulate
from penstock.traffic import open_trace

TRACE = Path(__file__).parent.parent / "data" / "azure_2023_conv_200.csv"

print(f"{'policy':10} {'TTFT p50':>9} {'TTFT p99':>9} {'TPOT p50':>9} {'TPOT p99':>9}  (ms)")
for preset in ("vllm-v1", "sglang"):
    config = load_config(
        model="llama-3.1-8b",
        flags={
            "fleet.0.executor.kind": "modelled",
            "fleet.0.executor.gpu": "a100-80g",
            "fleet.0.policy.preset": preset,
        },
    )
    total = simulate(config, open_trace(TRACE, speed=4.0, model="llama-3.1-8b")).figures.all
    times = (total.ttft_s.p50, total.ttft_s.p99, total.tpot_s.p50, total.tpot_s.p99)
    print(f"{preset:10} " + " ".join(f"{1000 * (time or 0):9.1f}" for time in times))
