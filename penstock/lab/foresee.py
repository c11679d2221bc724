"""What a bench of a served engine will show: the same requests, through the same driver, in virtual time.

    real        Driver -> Client -- HTTP --> gateway -> fleet -> replica -> torch executor
    foreseen    Driver -> Foreseen ---------------------> fleet -> replica -> modelled executor

`Foreseen` stands for client, gateway and channel: it waits for a request's way in and notes a token after its way
out, as long as the profile says (cost.serving). All figures are made by the driver's code from the driver's readings,
so nothing differs but where the instants come from.

Steps scatter as they did in the calibration (cost.jitter), from the stream of `seed`: a run is one of many that could
be, like a real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from penstock.assemble import Config, Leaves, assemble
from penstock.assemble.leaves import modelled_outside
from penstock.cluster.inside import Inside
from penstock.cluster.predictors import scheduler_of, shape_of_model, step_model
from penstock.cluster.spec import Outside, ReplicaSpec
from penstock.core.clock import now, sleep_until
from penstock.core.ports import Service
from penstock.core.rng import stream
from penstock.core.types import Output, Request
from penstock.cost.jitter import Jittered
from penstock.cost.serving import ServingCost
from penstock.lab.client import Wish
from penstock.lab.drive import Driven, Driver
from penstock.lab.stream import Reading
from penstock.report.log import Null
from penstock.sim.channel import Link, pair
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run

Item = tuple[float, Request]


def foresee(
    config: Config, requests: Iterable[Item], serving: ServingCost, *, seed: int = 0
) -> Driven:
    """Drive the requests at a modelled deployment. Raises BadConfig, BadModel."""
    return run(_drive(config, list(requests), serving, seed))


async def _drive(config: Config, requests: list[Item], serving: ServingCost, seed: int) -> Driven:
    inside = Inside(lambda spec: _scattered(spec, serving, seed), lambda: pair(Link()))
    leaves = Leaves(start=inside.start, stop=inside.stop, log=lambda who: Null())
    service = await assemble(config, leaves)
    try:
        asker = Foreseen(service, {request.id: request for _, request in requests}, serving)
        return await Driver(asker, Named()).run(requests)
    finally:
        await service.stop()


def _scattered(spec: ReplicaSpec, serving: ServingCost, seed: int) -> Outside:
    """The modelled outside of a replica, its steps launched singly and scattered."""
    outside = modelled_outside(spec, Null())
    executor = replace(spec.executor, kind="modelled")
    charged = scheduler_of(executor, spec.policies)
    jittered = Jittered(
        step_model(executor, shape_of_model(spec.model, executor)),
        scatter=serving.scatter,
        chance=stream(seed, spec.name, "scatter").random,
    )
    modelled = ModelledExecutor(
        jittered,
        caps=replace(outside.executor.caps, max_repeat=1),
        scheduler=None if charged is None else charged.cost.seconds,
    )
    return replace(outside, executor=modelled)


class Named:
    """In place of a text, the request's id: where nothing reads prompts none need be written."""

    def compose(self, request: Request) -> str:
        return request.id


class Foreseen:
    """A client whose server is modelled; wishes carry the ids of its requests as prompts."""

    def __init__(
        self, service: Service, requests: dict[str, Request], serving: ServingCost
    ) -> None:
        self._service, self._requests, self._serving = service, requests, serving
        self._num_open = 0
        self._told: list[tuple[Reading, Output]] = []  # by the step that ended just now

    async def ask(self, wish: Wish, reading: Reading) -> Reading:
        assert isinstance(wish.prompt, str)
        request = self._requests[wish.prompt]
        reading.num_prompt, reading.num_output = request.prompt.num_tokens, 0
        others = self._num_open
        self._num_open += 1
        try:
            await asyncio.sleep(self._serving.request_seconds(request.prompt.num_tokens, others))
            await self._service.submit(request, lambda output: self._hear(reading, output))
            if reading.last_at is not None:
                await sleep_until(reading.last_at)
        finally:
            self._num_open -= 1
        return reading

    def _hear(self, reading: Reading, output: Output) -> None:
        if not self._told:
            asyncio.get_running_loop().call_soon(self._note)
        self._told.append((reading, output))

    def _note(self) -> None:
        """Once all tokens of the step are here."""
        told, self._told = self._told, []
        at = now() + self._serving.reply_seconds(len(told))
        for reading, output in told:
            assert reading.num_output is not None
            reading.num_output += output.num_tokens
            reading.num_cached = output.num_cached or reading.num_cached
            reading.finish = output.finish
            if output.num_tokens or reading.first_at is None:
                reading.mark(at)
