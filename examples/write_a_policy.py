"""A policy is one small class: here an order policy that serves the shortest prompt first, against FCFS.

Give it a file in penstock/policy/order/ and a line in penstock/policy/__init__.py, and configurations can name it, the
law tests run on it, and it serves real requests as it stands. Run with `python examples/write_a_policy.py`.
"""

from dataclasses import dataclass
from pathlib import Path

from penstock import policy
from penstock.assemble import load_config
from penstock.lab.simulate import simulate
from penstock.policy.order import Decision, View
from penstock.traffic import open_trace

TRACE = Path(__file__).parent.parent / "data" / "azure_2023_conv_200.csv"


@dataclass
class ShortestPrompt:
    """Waiting jobs by prompt length; a job passed over for `patience_s` seconds goes first."""

    patience_s: float = 30.0

    def decide(self, view: View) -> Decision:
        def rank(job):
            return (view.now - job.arrived_at < self.patience_s, job.num_prompt, job.seq)

        return Decision(sorted(view.waiting, key=rank), "shortest prompt first")


policy.TABLE["order"]["shortest-prompt"] = f"{__name__}:ShortestPrompt"

for order in ("fcfs", "shortest-prompt"):
    config = load_config(
        model="llama-3.1-8b",
        flags={
            "fleet.0.executor.kind": "modelled",
            "fleet.0.executor.gpu": "a10g",
            "fleet.0.policy.order": order,
        },
    )
    total = simulate(config, open_trace(TRACE, speed=12.0, model="llama-3.1-8b")).figures.all
    print(f"{order:16} mean TTFT {total.ttft_s.mean:6.2f} s, p99 {total.ttft_s.p99:6.2f} s")
