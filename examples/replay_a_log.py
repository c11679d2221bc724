"""Every decision in a log can be taken again, offline, and must come out the same.

Run with `python examples/replay_a_log.py`. The log here comes from a simulation; one that `penstock serve --log DIR`
wrote replays in the same way.
"""

import tempfile
from pathlib import Path

from penstock.assemble import load_config
from penstock.lab.replay import replay_log
from penstock.lab.simulate import simulate
from penstock.traffic import open_trace

TRACE = Path(__file__).parent.parent / "data" / "mooncake_conversation_100.jsonl"

config = load_config(
    model="llama-3.1-8b",
    flags={
        "fleet.0.executor.kind": "modelled",
        "fleet.0.executor.gpu": "h100",
        "fleet.0.replicas": 2,
    },
)
with tempfile.TemporaryDirectory() as folder:
    log = Path(folder) / "run.jsonl"
    outcome = simulate(config, open_trace(TRACE, model="llama-3.1-8b"), log_path=log)
    print(f"{outcome.played.num_served} requests served")
    again = simulate(config, open_trace(TRACE, model="llama-3.1-8b"))
    print("the same log again, bit for bit:", again.digest == outcome.digest)
    for replayed in replay_log(log):
        verdict = "all identical" if replayed.difference is None else str(replayed.difference)
        print(f"{replayed.who}: {replayed.num_decisions} decisions, {verdict}")
