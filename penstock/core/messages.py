"""What a fleet and a replica say to each other over a channel. Plain data, read-only; `net` carries it unread.

Those sent for every request are Records, which cost least to make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from penstock.core.fetching import Hint, Leave, Seek, Show, Shown
from penstock.core.moving import JobState, KvCard, SettleHow
from penstock.core.records import Record
from penstock.core.reshaping import NewShape, Placing
from penstock.core.types import SCHEMA, BlockHash, Output, Report, Request, Role, Stage


class Submit(Record):
    """Fleet -> replica. Without `every_token` only the last output of each answer is sent back.

    With a `state` the request's one answer goes on behind the tokens that it has. One that `pauses` stands still before
    that stage (decode: behind its first token, prefill: when its images are encoded), until Offer or GoOn.
    `seq` rises with every request a fleet sends to this replica, which says in its reports how far it has come.
    """

    request: Request
    every_token: bool = True
    state: JobState | None = None
    seq: int = 0
    pauses: Stage | None = None
    kind: Literal["submit"] = "submit"


@dataclass(frozen=True, slots=True)
class Cancel:
    """Fleet -> replica: free the request's blocks within one step."""

    request: str
    kind: Literal["cancel"] = "cancel"


@dataclass(frozen=True, slots=True)
class TakeAdapter:
    """Fleet -> replica: from now on there is this adapter, in this folder; say AdapterTaken."""

    adapter: str
    folder: str
    kind: Literal["take_adapter"] = "take_adapter"


@dataclass(frozen=True, slots=True)
class DropAdapter:
    """Fleet -> replica: take no more requests for this adapter."""

    adapter: str
    kind: Literal["drop_adapter"] = "drop_adapter"


@dataclass(frozen=True, slots=True)
class SetRole:
    """Fleet -> replica: from now on say this role in reports; what it serves goes on."""

    role: Role
    kind: Literal["set_role"] = "set_role"


@dataclass(frozen=True, slots=True)
class Reshape:
    """Fleet -> replica: have so many devices for the experts, placed by that policy; say ReshapeDone."""

    devices: int
    placing: Placing = "elastic-moe"
    kind: Literal["reshape"] = "reshape"


@dataclass(frozen=True, slots=True)
class GoOn:
    """Fleet -> replica: the request does not pause any more."""

    request: str
    kind: Literal["go_on"] = "go_on"


@dataclass(frozen=True, slots=True)
class Drain:
    """Fleet -> replica: refuse new requests; say Drained when the running ones ended."""

    kind: Literal["drain"] = "drain"


@dataclass(frozen=True, slots=True)
class Stop:
    """Fleet -> replica: end now."""

    kind: Literal["stop"] = "stop"


@dataclass(frozen=True, slots=True)
class Offer:
    """Fleet -> replica, movement `move`: say (Offered) what you hold of a request.

    `is_last`: take it out of the running first, as soon as no plan holds it; it stays here, held, until Settle.
    """

    move: int
    request: str
    is_last: bool
    kind: Literal["offer"] = "offer"


@dataclass(frozen=True, slots=True)
class Take:
    """Fleet -> replica: copy the blocks of positions [0, state.computed) that are not here; with the last one, go on.

    `blocks`: the source's, from the first position on, to be read at `address`. The request comes with the first Take
    of a movement. `waits`: until there is room; otherwise answer at once that there is none. `pauses`: as with Submit.
    """

    move: int
    name: str  # of the request
    state: JobState
    is_last: bool
    waits: bool = False
    request: Request | None = None
    address: str = ""
    blocks: tuple[int, ...] = ()
    pauses: Stage | None = None
    kind: Literal["take"] = "take"


@dataclass(frozen=True, slots=True)
class Settle:
    """Fleet -> replica: the end of a movement. To the source: it has moved (release), or it has not (resume).

    To the target: it is yours (confirm: what was copied is what the source held), or drop what you took.
    """

    move: int
    request: str
    how: SettleHow
    kind: Literal["settle"] = "settle"


@dataclass(frozen=True, slots=True)
class Lend:
    """Fleet -> replica: keep so many blocks for a request of another replica; say Lent."""

    loan: int
    num_blocks: int
    kind: Literal["lend"] = "lend"


@dataclass(frozen=True, slots=True)
class Borrow:
    """Fleet -> replica: the request, which comes or is there, may have so many of its blocks at `address`."""

    loan: int
    request: str
    num_blocks: int
    address: str
    kind: Literal["borrow"] = "borrow"


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Fleet -> replica, at either end: the loan is over, as its request is.

    `num_blocks`: only so many of its blocks are not used any more.
    """

    loan: int
    num_blocks: int | None = None
    kind: Literal["give_back"] = "give_back"


@dataclass(frozen=True, slots=True)
class Recall:
    """Fleet -> home: so many blocks of a loan are wanted back. Copy what they keep into the loans `into` (number,
    blocks, where), which are lent for as many or for fewer, and the others home; say Recalled.
    """

    loan: int
    num_blocks: int
    into: tuple[tuple[int, int, str], ...] = ()
    kind: Literal["recall"] = "recall"


@dataclass(frozen=True, slots=True)
class Recalled:
    """Home -> fleet: the answer to Recall; with an `error` everything is where it was."""

    loan: int
    error: str | None = None
    kind: Literal["recalled"] = "recalled"


@dataclass(frozen=True, slots=True)
class Lent:
    """Replica -> fleet: the answer to Lend; with an `error` nothing was lent."""

    loan: int
    address: str = ""
    error: str | None = None
    kind: Literal["lent"] = "lent"


@dataclass(frozen=True, slots=True)
class Offered:
    """Replica -> fleet: the answer to Offer. With an `error` there is nothing to move.

    `blocks` hold positions [0, state.computed).
    """

    move: int
    is_last: bool
    state: JobState | None = None
    blocks: tuple[int, ...] = ()
    error: str | None = None
    kind: Literal["offered"] = "offered"


@dataclass(frozen=True, slots=True)
class Taken:
    """Replica -> fleet: the answer to Take; after the last one it runs here.

    `num_blocks` were copied, and `num_bytes` of embeddings.
    """

    move: int
    is_last: bool
    num_blocks: int = 0
    error: str | None = None
    num_bytes: int = 0
    kind: Literal["taken"] = "taken"


class Outputs(Record):
    """Replica -> fleet: all that one step produced, one message a step. `items` = (request id, output)."""

    items: tuple[tuple[str, Output], ...]
    kind: Literal["outputs"] = "outputs"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Replica -> fleet: the request was not taken. `code` is a class name of core.errors."""

    request: str
    code: str
    message: str
    hint: str = ""
    param: str | None = None
    retry_after_s: float | None = None
    kind: Literal["refuse"] = "refuse"


@dataclass(frozen=True, slots=True)
class AdapterTaken:
    """Replica -> fleet: the answer to TakeAdapter; with a `code`, a class name of core.errors, why it was not taken."""

    adapter: str
    code: str | None = None
    message: str = ""
    hint: str = ""
    kind: Literal["adapter_taken"] = "adapter_taken"


@dataclass(frozen=True, slots=True)
class ReshapeDone:
    """Replica -> fleet: the answer to Reshape; without a `shape` why not, `code` being a class name of core.errors."""

    shape: NewShape | None
    code: str = ""
    message: str = ""
    hint: str = ""
    kind: Literal["reshape_done"] = "reshape_done"


@dataclass(frozen=True, slots=True)
class Hello:
    """Replica -> fleet, once: what it serves. The first message on a channel. `about` says to people on what.

    `kv` None: its jobs cannot move.
    """

    report: Report
    schema: int = SCHEMA
    about: str = ""
    kv: KvCard | None = None
    kind: Literal["hello"] = "hello"


class Changes(NamedTuple):
    """Blocks that came to a place, and those that left it."""

    stored: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()


NO_CHANGES = Changes()


class BlockNews(NamedTuple):
    """Blocks that can be found by hash since the last time, and those that cannot any more: on the device.

    `host`, `disk`: the same of the memory behind it.
    """

    stored: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()
    host: Changes = NO_CHANGES
    disk: Changes = NO_CHANGES

    @property
    def num_blocks(self) -> int:
        """That are told of."""
        places = (self, self.host, self.disk)
        return sum([len(each.stored) + len(each.removed) for each in places])


class Say(Record):
    """Replica -> fleet: its current report; `news` where somebody wants to know what its blocks hold."""

    report: Report
    news: BlockNews | None = None
    kind: Literal["say"] = "say"


@dataclass(frozen=True, slots=True)
class Drained:
    """Replica -> fleet: nothing runs here any more."""

    kind: Literal["drained"] = "drained"


@dataclass(frozen=True, slots=True)
class Failed:
    """Replica -> fleet: it cannot start or go on; `message` is for the operator."""

    code: str
    message: str
    hint: str = ""
    kind: Literal["failed"] = "failed"


Message = (
    Submit
    | Cancel
    | TakeAdapter
    | DropAdapter
    | SetRole
    | Reshape
    | GoOn
    | Drain
    | Stop
    | Offer
    | Take
    | Settle
    | Lend
    | Borrow
    | GiveBack
    | Recall
    | Recalled
    | Lent
    | Hint
    | Seek
    | Show
    | Shown
    | Leave
    | Offered
    | Taken
    | Outputs
    | Refuse
    | AdapterTaken
    | ReshapeDone
    | Hello
    | Say
    | Drained
    | Failed
)
