"""One file per published system: its claim, what it is measured against, and when it counts as reproduced.

Refuses: mechanisms and policies. An experiment only says what is to be run and how it is judged.

To add one in an evening:
1. Write `experiments/NAME.py` with EXPERIMENT = Experiment(...). Its docstring cites the source and says what cannot be
   repeated here and what stands in for it. Fix the criterion before you look at results.
2. `plan` lists runs as JSON settings with a `variant` and a `seed`; `work` runs one of them, usually
   `trial(deployment(policy), Offered(...))` of penstock.lab.trial; `judge` pairs variants by seed and states a verdict.
   SCHEDULERS of lab.trial are the baselines that every claim about schedulers is compared with.
3. Add a line to TABLE, and run `penstock reproduce NAME --quick`, then `--full --keep`. docs/systems.md is generated.

The rules a runner can enforce are in penstock.lab.experiment; docs/reproducing.md is for users.
"""

from __future__ import annotations

import difflib
import importlib

from penstock.core.errors import BadConfig
from penstock.lab.experiment import Experiment

TABLE: dict[str, str] = {
    "llumnix": "penstock.experiments.llumnix",
    "burstgpt": "penstock.experiments.burstgpt",
    "distserve": "penstock.experiments.distserve",
    "dualmap": "penstock.experiments.dualmap",
    "routers": "penstock.experiments.routers",
    "xllm": "penstock.experiments.xllm",
    "xllm-cache": "penstock.experiments.xllm_cache",
    "xllm-encode": "penstock.experiments.xllm_encode",
    "dllm-serve": "penstock.experiments.dllm_serve",
    "elastic-moe": "penstock.experiments.elastic_moe",
    "infinite-llm": "penstock.experiments.infinite_llm",
    "past-future": "penstock.experiments.past_future",
    "fast-switch": "penstock.experiments.fast_switch",
    "flow-prefill": "penstock.experiments.flow_prefill",
    "layered": "penstock.experiments.layered",
    "nanoflow": "penstock.experiments.nanoflow",
    "pd-serve": "penstock.experiments.pd_serve",
    "semi-pd": "penstock.experiments.semi_pd",
    "jitserve": "penstock.experiments.jitserve",
    "sglang-ratio": "penstock.experiments.sglang_ratio",
    "split-fuse": "penstock.experiments.split_fuse",
    "vllm-chunk": "penstock.experiments.vllm_chunk",
}


def find(name: str) -> Experiment:
    """An experiment by name. Raises BadConfig with the nearest known one."""
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, n=1)
        told = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TABLE)}"
        raise BadConfig(f"there is no experiment {name!r}; {told}")
    found = importlib.import_module(TABLE[name]).EXPERIMENT
    assert isinstance(found, Experiment) and found.name == name
    return found
