"""The engine's process with a modelled executor on the wall clock: `python -m tests.cluster.modelled_worker`.

What it does at its start is told by the model's name: "fails" raises BadModel, "crashes" ends without a word,
"hangs" never comes to an end, "freezes" stands still with its second step, anything else serves, one token every
STEP_S.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence

from penstock.cluster.spec import Outside, ReplicaSpec
from penstock.cluster.worker import main
from penstock.core.errors import BadModel
from penstock.core.plans import Done, Plan, Sampled
from penstock.core.ports import Completion, Grain
from penstock.core.types import Caps, PlanId
from penstock.engine.turn import Predictors
from penstock.report.log import Null

STEP_S = 0.02


class TickingExecutor:
    """Takes STEP_S a step and draws token 7."""

    caps = Caps(num_layers=2, max_context=4096)

    def __init__(self, freezes: bool = False) -> None:
        self._freezes, self._steps = freezes, 0

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self._on_completion = on_completion

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        self._steps += 1
        if self._freezes and self._steps == 2:
            time.sleep(300)  # in the loop: nothing else happens in this process
        asyncio.get_running_loop().call_later(STEP_S, self._finish, plan)
        return plan.id

    def _finish(self, plan: Plan) -> None:
        outputs = tuple(Sampled(work.seq, 1, (7,)) for work in plan.work if work.samples)
        self._on_completion(Done(plan.id, 1, outputs, (asyncio.get_running_loop().time(),)))

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> None: ...

    def resume(self, plan: PlanId) -> None: ...

    def abort(self, plan: PlanId) -> None: ...

    def close_jobs(self, seqs: Sequence[int]) -> None: ...

    async def stop(self) -> None: ...


def open_ticking(spec: ReplicaSpec) -> Outside:
    if spec.model == "fails":
        raise BadModel("config.json is missing", hint="copy all files of the model")
    if spec.model == "crashes":
        sys.stderr.write("the last words of an engine\n")
        sys.stderr.flush()
        os._exit(9)
    if spec.model == "hangs":
        sys.stderr.write("reading weights from a disk that does not answer\n")
        sys.stderr.flush()
        time.sleep(300)
    nothing = Predictors(cost=None, lengths=None)  # type: ignore[arg-type]
    return Outside(
        executor=TickingExecutor(spec.model == "freezes"),
        num_blocks=512,
        predictors=nothing,
        log=Null(),
        about="ticking",
    )


if __name__ == "__main__":
    sys.exit(main(open_ticking))
