"""A job: one answer in progress inside one replica. Imported from core.types, where its words are explained.

In a file of its own because what is written to it is most of what a step does: compiled, its fields are fields of a C
struct (core.compiled).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.core.types import BlockHash, Request, Status, WorkOption


class Job:
    """One answer in progress. Only its replica writes to it.

    `carried`: (tokens, layers) of a chunk that has passed so many layers and not yet the rest; its positions count as
    computed when it has passed the last. None = no chunk is under way.
    """

    __slots__ = (
        "seq", "request", "answer", "arrived_at", "hashes", "num_prompt", "max_tokens", "num_output", "computed",
        "in_flight", "cached", "carried", "status", "priority", "num_preemptions", "furthest", "num_recomputed",
        "admitted_at", "first_token_at", "last_token_at", "is_cancelled", "is_streamed",
    )  # fmt: skip

    def __init__(  # noqa: PLR0913 - a record's fields
        self,
        *,
        seq: int,
        request: Request,
        answer: int,
        arrived_at: float,
        hashes: list[BlockHash],
        num_prompt: int,
        max_tokens: int,
        num_output: int = 0,
        computed: int = 0,
        in_flight: int = 0,
        cached: int = 0,
        carried: tuple[int, int] | None = None,
        status: Status = "waiting",
        priority: int = 0,
        num_preemptions: int = 0,
        furthest: int = 0,
        num_recomputed: int = 0,
        admitted_at: float | None = None,
        first_token_at: float | None = None,
        last_token_at: float | None = None,
        is_cancelled: bool = False,
        is_streamed: bool = True,
    ) -> None:
        self.seq = seq  # arrival number inside its replica; also its name in plans and logs
        self.request = request
        self.answer = answer  # which of the request's n answers
        self.arrived_at = arrived_at
        self.hashes = hashes  # of full blocks known so far: the prompt's, then the output's
        self.num_prompt, self.max_tokens = num_prompt, max_tokens
        self.num_output, self.computed, self.in_flight = num_output, computed, in_flight
        self.cached = cached  # positions adopted from the prefix cache when first admitted
        self.carried = carried
        self.status: Status = status
        self.priority, self.num_preemptions = priority, num_preemptions
        self.furthest = furthest  # most positions it had computed when it was preempted
        self.num_recomputed = num_recomputed  # positions computed again after preemptions
        self.admitted_at, self.first_token_at = admitted_at, first_token_at
        self.last_token_at = last_token_at
        self.is_cancelled = is_cancelled
        self.is_streamed = is_streamed  # its caller hears of every token, not of the end alone

    @property
    def known(self) -> int:
        return self.num_prompt + self.num_output

    @property
    def todo(self) -> int:
        return self.num_prompt + self.num_output - self.computed - self.in_flight

    @property
    def is_prefilling(self) -> bool:
        return self.computed + self.in_flight < self.num_prompt

    @property
    def id(self) -> str:
        return f"{self.request.id}.{self.answer}"

    def frontier(self) -> list[WorkOption]:
        from penstock.core.types import WorkOption  # which imports this module

        todo = self.todo
        if todo <= 0:
            return []
        return [WorkOption("extend", 1, todo, self.request.kind == "generate")]
