"""Ports: what the outside must offer. Each has twins, a real leaf and a modelled one, under one contract test.

Executor   runs plans                     torch (engine.torch) | modelled (sim.executor) | replayed (lab.replay)
Channel    carries messages to one peer   local, zmq (net)     | modelled (sim.channel)
Transport  reads blocks of peers' memory  shared, tcp (net)    | modelled (sim.transport)
Service    turns requests into tokens     the fleet (cluster)  | the same fleet in virtual time
Tool       runs a tool call               sandbox (agents)     | modelled (sim)
Power      reads and caps watts           nvml                 | modelled (sim)
Storage    keeps bytes                    a folder             | memory
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from penstock.core.adapters import Adapter
from penstock.core.errors import PenstockError
from penstock.core.events import Event
from penstock.core.messages import BlockNews, Offered, Submit, Taken
from penstock.core.moving import KvCard, SettleHow
from penstock.core.plans import Adapted, Done, Filed, Filing, Moved, Plan, Transfer, Yielded
from penstock.core.reshaping import NewShape, Placing
from penstock.core.transport import Runs as Runs
from penstock.core.transport import Transport as Transport
from penstock.core.types import BlockHash, Caps, Output, PlanId, Report, Request, Role, Stage

Completion = Done | Yielded | Moved | Filed | Adapted
Grain = Literal["step", "layer", "operator"]


class Executor(Protocol):
    """Runs plans, one a lane at a time. All calls and callbacks happen on the loop's thread.

    Life of a plan: launch -> Done, or launch -> (interrupt) -> Yielded -> resume -> ... -> Done, or abort at any
    moment, after which nothing more is heard of it. Completions of one lane arrive in launch order.

    `repeat` > 1 (only up to `caps.max_repeat`) asks to run the plan's single-token work that many times in a row,
    each time one position further, stopping early after the first run in which an answer ends. Blocks for the
    further positions are booked by the replica when it hears how many runs were made. A leaf may always answer
    with steps_run = 1.
    """

    @property
    def caps(self) -> Caps: ...

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        """Set who hears of completions; called once, before the first launch."""
        ...

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId: ...

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> int | None:
        """Stop at the next boundary not finer than `grain`. At "step" a repeated plan answers Done early.

        How many steps that one will have run; None where plans are not repeated.
        """
        ...

    def resume(self, plan: PlanId) -> None: ...

    def abort(self, plan: PlanId) -> None: ...

    def close_jobs(self, seqs: Sequence[int]) -> None:
        """Drop the state of jobs that ended while no plan was due to say so."""
        ...

    async def stop(self) -> None:
        """Let go of threads, processes and memory. Nothing may be launched afterwards."""
        ...


class RepeatingExecutor(Executor, Protocol):
    """An executor with `caps.max_repeat` > 1."""

    def num_ended(self, plan: PlanId) -> int:
        """Steps of a repeated plan that have ended, and of which nothing was said yet; one still runs."""
        ...


class MovingExecutor(Executor, Protocol):
    """An executor with slower memory behind the device's (`caps.host_blocks` or `caps.tier_blocks` > 0).

    Transfers run beside plans and each other, and what they touch is never in use by two at once:

        a transfer begins when the earlier ones that touch the same block, of the device or of the host, have ended
        a plan begins when all transfers that touch blocks new to it (Work.blocks, Decodes.fresh) have ended, and all
        that were asked for as `is_sync`

    Whoever asks sees to it that no plan that runs computes on the blocks of a transfer. `transfer` never answers before
    it returns; Moved comes to the listener, once, unless the executor is stopped.
    """

    def transfer(self, transfer: Transfer) -> None: ...


class FilingExecutor(MovingExecutor, Protocol):
    """One with a disk behind its host memory (`caps.disk_blocks` > 0), which held `found` (names, slots) when opened.

    Filings run beside all else, one by one; nothing else may touch their host blocks. Filed comes to the listener once.
    """

    @property
    def found(self) -> Sequence[tuple[BlockHash, int]]: ...
    @property
    def kv_block_bytes(self) -> int:
        """Of a block; 0 where it is not known."""
        ...

    def file(self, filing: Filing) -> None: ...


class AdaptingExecutor(Executor, Protocol):
    """An executor with `caps.max_adapters` slots for adapters, each of which holds one.

    `load_adapter` puts one into a slot that no job uses, beside the plans that run, and Adapted comes to the listener,
    once, unless the executor is stopped. Jobs that use an adapter are opened after that.
    """

    def load_adapter(self, adapter: str, slot: int) -> None: ...


class PortableExecutor(Executor, Protocol):
    """An executor with `caps.moves_jobs`: what it keeps of a job can be taken out, and come in with an Opening."""

    def take_out(self, seq: int, num_output: int) -> tuple[tuple[int, ...], int | None]:
        """Of a job that no plan holds: ids of its first `num_output` tokens (none where they are modelled), and its
        chance (core.moving.JobState).
        """
        ...


class Channel(Protocol):
    """A way to send to one peer. Messages arrive whole, in order, or the channel is closed."""

    async def send(self, message: object, num_bytes: int = 0) -> None:
        """Hand over one message; `num_bytes` is what a modelled link charges for it. Raises ReplicaLost when closed."""
        ...

    def offer(self, message: object, num_bytes: int = 0) -> bool:
        """`send` for whoever cannot wait: False, and nothing was sent, when it would have to. Raises alike."""
        ...

    def listen(self, on_message: Callable[[object], None]) -> None: ...

    def watch(self, on_closed: Callable[[str], None]) -> None:
        """Set who hears, once, that nothing more will come: the peer closed, died or was lost (and why).

        Whoever closes its own end is not told. Messages received before are delivered first.
        """
        ...

    async def close(self) -> None: ...


OnOutput = Callable[[Output], None]
OnFailed = Callable[[PenstockError], None]
OnEnded = Callable[[Exception | None], None]


class Call(Protocol):
    """A request under way that was begun with `StartService.start`."""

    def cancel(self) -> object:
        """Nobody waits for it any more: stop it wherever it is. Its `on_ended` is not called."""
        ...


class Service(Protocol):
    """Models behind names. The gateway, agents and learners reach models only through this."""

    def models(self) -> Sequence[str]: ...

    async def submit(self, request: Request, on_output: OnOutput | None = None) -> None:
        """Serve one request; return when all its answers have ended.

        `on_output` hears of tokens as they come, at most once a step and answer. Cancelling the awaiting task
        cancels the request wherever it is. Raises PenstockError (UnknownModel, ContextTooLong, Overloaded,
        Draining, ReplicaLost, StepFailed).
        """
        ...

    def reports(self) -> Sequence[Report]: ...

    async def drain(self) -> None:
        """Refuse new requests and return when the running ones have ended."""
        ...


class AdapterService(Service, Protocol):
    """A Service whose models have adapters that come and go."""

    def adapters(self) -> Mapping[str, Adapter]:
        """By name."""
        ...

    async def load_adapter(
        self, name: str, folder: str, *, model: str | None = None, replaces: bool = False
    ) -> None:
        """Return when every replica of the model has checked it. Raises BadModel, BadRequest, UnknownModel."""
        ...

    def unload_adapter(self, name: str) -> None:
        """Take no more requests for it; those under way end. Raises UnknownModel."""
        ...


class StartService(Service, Protocol):
    """A Service that also calls back."""

    def start(self, request: Request, on_ended: OnEnded, on_output: OnOutput | None = None) -> Call:
        """`submit` for whoever has no task to wait in: a million requests need none.

        Raises what refuses the request at once. Afterwards `on_ended` hears once: None when all answers have ended,
        or why they cannot.
        """
        ...


class ReplicaPort(Protocol):
    """One replica as a fleet sees it: the far end may be in this process, another one, or another host."""

    @property
    def name(self) -> str: ...

    def submit(self, asked: Submit, on_output: OnOutput, on_failed: OnFailed) -> None:
        """Start a request. Each answer's last Output has `finish` set; without `every_token` it has num_tokens of all.

        When the replica refuses or is lost, `on_failed` hears why, once, and nothing more is heard of the request.
        Report.absorbed says up to which `seq` a report has counted, None where the far end cannot tell. A `state` and
        `pauses` are for MovingPorts that have a `kv`.
        """
        ...

    def cancel(self, request_id: str) -> None: ...

    def listen(self, on_report: Callable[[Report], None]) -> None: ...

    async def drain(self) -> None: ...

    async def stop(self) -> None: ...


class BlockPort(ReplicaPort, Protocol):
    """A replica that tells what its blocks hold."""

    def listen_blocks(self, on_news: Callable[[BlockNews], None]) -> None:
        """Set who hears, with or before the report that was made at the same time. All of it is gone when it dies."""
        ...


class AdapterPort(ReplicaPort, Protocol):
    """A replica that can be told of adapters."""

    async def take_adapter(self, adapter: str, folder: str) -> None:
        """Return when it has checked it, or is not there to ask (it is told when it comes). Raises why it refuses."""
        ...

    def drop_adapter(self, adapter: str) -> None: ...


class ReshapingPort(ReplicaPort, Protocol):
    """A replica that can have more or fewer devices."""

    async def reshape(self, devices: int, placing: Placing) -> NewShape:
        """Return when it serves so. Raises PenstockError, and nothing has changed."""
        ...


class RolePort(ReplicaPort, Protocol):
    """A replica whose role can be changed while it runs."""

    def set_role(self, role: Role) -> None:
        """It is of that role from now on; what it serves goes on."""
        ...


OnMoved = Callable[[Offered | Taken | PenstockError], None]


class MovingPort(ReplicaPort, Protocol):
    """A replica whose jobs can leave for another one; see core.messages for the words."""

    @property
    def kv(self) -> KvCard | None:
        """None: they cannot, or it is not running."""
        ...

    def go_on(self, request_id: str) -> None:
        """One that stands still where it was to pause does so no longer."""
        ...

    def offer(self, move: int, request_id: str, is_last: bool) -> None: ...

    def take(
        self,
        move: int,
        request: Request,
        offered: Offered,
        *,
        address: str,
        is_first: bool,
        waits: bool = False,
        pauses: Stage | None = None,
    ) -> None: ...

    def settle(self, move: int, request_id: str, how: SettleHow) -> None: ...

    def attend(self, move: int, on_moved: OnMoved) -> None:
        """Who hears of the answers, and if it is lost. Nothing is told after `settle` or `forget`."""
        ...

    def forget(self, move: int) -> None: ...

    def adopt(self, request: Request, on_output: OnOutput, on_failed: OnFailed) -> None:
        """It runs there now: its outputs go to this listener."""
        ...

    def disown(self, request_id: str) -> None:
        """It does not run there any more, whatever it says."""
        ...


class Log(Protocol):
    """Where mechanisms write what happened; see core.events."""

    def emit(self, event: Event) -> None: ...
