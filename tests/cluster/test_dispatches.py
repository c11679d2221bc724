"""The ledger of what was sent: report + sent is what the replica would say now, after any order of events."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.dispatches import REPORTS_TRUSTED, Dispatches
from penstock.core.prompt import HashedPrompt
from penstock.core.types import Report, Request, RequestId
from penstock.policy.loads import NOTHING_SENT, pending_tokens

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["send", "take", "serve", "report", "hear", "end"]), st.integers(0, 99)
    ),
    max_size=80,
)


def request_of(number: int, tokens: int) -> Request:
    return Request(id=RequestId(f"r{number}"), model="m", prompt=HashedPrompt(tokens), n=1)


class World:
    """One replica with a wire of any delay on either way, and the ledger at the near end."""

    def __init__(self) -> None:
        self.ledger = Dispatches(keeps_queue=True)
        self.on_way: list[tuple[int, Request]] = []
        self.waiting: dict[str, Request] = {}
        self.ended: list[str] = []  # served, and nobody heard yet
        self.absorbed = 0
        self.said: list[Report] = [Report(replica="a", at=0.0, absorbed=0)]
        self.heard = self.said[0]
        self.sent = 0

    def step(self, what: str, number: int) -> None:
        if what == "send":
            self.sent += 1
            request = request_of(self.sent, 16 * (number + 1))
            self.ledger.send(0.0, request, self.heard, hit=0)
            self.on_way.append((self.ledger.last_seq("a"), request))
        elif what == "take" and self.on_way:
            self.absorbed, request = self.on_way.pop(0)
            self.waiting[request.id] = request
        elif what == "serve" and self.waiting:
            name = sorted(self.waiting)[number % len(self.waiting)]
            del self.waiting[name]
            self.ended.append(name)
        elif what == "report":
            tokens = sum(one.prompt.num_tokens for one in self.waiting.values())
            report = Report(replica="a", at=0.0, absorbed=self.absorbed, waiting_tokens=tokens)
            self.said.append(report)
        elif what == "hear" and self.said:
            self.heard = self.said.pop(0)
            self.ledger.hear(self.heard)
        elif what == "end" and self.ended:
            self.ledger.end(self.ended.pop(0), "a")


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_the_sum_is_what_was_sent_and_not_counted_by_the_report(
    steps: list[tuple[str, int]],
) -> None:
    world, sizes = World(), {}
    for what, number in steps:
        world.step(what, number)
        if what == "send":
            sizes[world.sent] = 16 * (number + 1)
        told = {f"r{seq}" for seq in sizes}
        gone = told - world.ledger.queued.get("a", {}).keys()
        absorbed = world.heard.absorbed or 0
        left = [n for n in sizes if n > absorbed and f"r{n}" not in gone]
        sent = world.ledger.sent.get("a", NOTHING_SENT)
        assert (sent.num, sent.tokens) == (len(left), sum(sizes[n] for n in left))
        assert sent.blocks == sum(sizes[n] // 16 for n in left)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_when_all_was_heard_the_load_is_exact(steps: list[tuple[str, int]]) -> None:
    world = World()
    for what, number in steps:
        world.step(what, number)
    for what in ("take",) * len(world.on_way) + ("end",) * len(world.ended) + ("report",):
        world.step(what, 0)
    while world.said:
        world.step("hear", 0)
    truth = sum(one.prompt.num_tokens for one in world.waiting.values())
    assert pending_tokens(world.heard, world.ledger.sent.get("a", NOTHING_SENT)) == truth
    assert not world.ledger.sent or not world.ledger.sent["a"].num


def test_a_replica_without_numbers_is_trusted_after_a_token_or_three_reports() -> None:
    ledger, report = Dispatches(), Report(replica="a", at=0.0)
    ledger.hear(report)
    for number in (1, 2):
        ledger.send(0.0, request_of(number, 32), report, hit=0)
    assert ledger.wants_begin("a") and not ledger.wants_begin("b")
    ledger.begin("r1", "a")
    assert ledger.sent["a"].num == 1
    for _ in range(REPORTS_TRUSTED):
        assert ledger.sent["a"].num == 1
        ledger.hear(report)
    assert ledger.sent["a"].num == ledger.sent["a"].tokens == ledger.sent["a"].blocks == 0
