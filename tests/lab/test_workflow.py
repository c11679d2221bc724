"""Workflows in virtual time: calls wait for each other, callers give up, and nothing is left behind in a replica."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.assemble import assemble, load_config, modelled_leaves
from penstock.core.clock import now
from penstock.core.errors import Overloaded
from penstock.core.events import Cancelled, Event, Finished
from penstock.core.prompt import TracedPrompt
from penstock.core.types import ProgramId, Report, Request, RequestId
from penstock.lab.bench import Bench, bench
from penstock.lab.play import Played, play
from penstock.lab.simulate import simulate
from penstock.lab.workflow import Workflows
from penstock.sim.loop import run
from penstock.traffic import Call, Workflow, open_trace
from tests.lab.little_server import Little, serving
from tests.traffic.written_workloads import FIXED, POISSON, workload

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "azure_a100.toml"


def call(name: str, *after: int, wait_s: float = 0.0, abandon_s: float | None = None) -> Call:
    request = Request(id=RequestId(name), model="default", prompt=TracedPrompt(5), true_output=3)
    return Call(request=request, after=after, wait_s=wait_s, abandon_s=abandon_s)


def flow(*calls: Call) -> Workflow:
    return Workflow(id=ProgramId("w"), kind="program", calls=calls)


class Clerk:
    """Answers after a time of each request's own; refuses those it is told to."""

    def __init__(self, takes_s: dict[str, float], refused: frozenset[str] = frozenset()) -> None:
        self.takes_s, self.refused = takes_s, refused
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.cut: dict[str, float] = {}

    async def ask(self, request: Request, at: float) -> bool:
        assert at <= now() + 1e-9
        self.began[request.id] = now()
        if request.id in self.refused:
            return False
        try:
            await asyncio.sleep(self.takes_s.get(request.id, 1.0))
        except asyncio.CancelledError:
            self.cut[request.id] = now()
            raise
        self.ended[request.id] = now()
        return True

    def play(self, *flows: Workflow) -> Workflows:
        async def main() -> Workflows:
            workflows = Workflows(self.ask)
            await asyncio.gather(*(workflows.play(each, now()) for each in flows))
            return workflows

        return run(main())


def test_a_chain_thinks_between_its_calls() -> None:
    clerk = Clerk({"a": 2.0, "b": 3.0, "c": 1.0})
    found = clerk.play(flow(call("a"), call("b", 0, wait_s=10.0), call("c", 1, wait_s=0.5)))
    assert clerk.began == pytest.approx({"a": 0.0, "b": 12.0, "c": 15.5})
    figures = found.figures()["program"]
    assert (figures.num, figures.num_whole, figures.num_calls) == (1, 1, 3)
    assert figures.e2e_s.p50 == pytest.approx(16.5) == figures.makespan_s


def test_a_fan_out_waits_for_the_slowest() -> None:
    clerk = Clerk({"plan": 1.0, "w0": 5.0, "w1": 2.0, "join": 1.0})
    clerk.play(flow(call("plan"), call("w0", 0), call("w1", 0), call("join", 0, 1, 2, wait_s=1.0)))
    assert clerk.began == pytest.approx({"plan": 0.0, "w0": 1.0, "w1": 1.0, "join": 7.0})


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Workflow, dict[str, float]]:
    num = draw(st.integers(1, 8))
    calls = []
    for place in range(num):
        after = draw(st.sets(st.integers(0, place - 1), max_size=3)) if place else set()
        calls.append(
            call(f"c{place}", *sorted(after), wait_s=draw(st.sampled_from([0.0, 1.0, 2.5])))
        )
    takes = {f"c{place}": draw(st.sampled_from([0.5, 1.0, 4.0])) for place in range(num)}
    return flow(*calls), takes


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_every_call_begins_when_the_last_of_its_predecessors_has_ended(
    told: tuple[Workflow, dict[str, float]],
) -> None:
    workflow, takes = told
    clerk = Clerk(takes)
    figures = clerk.play(workflow).figures()["program"]
    ends: list[float] = []  # by the longest path, place by place
    for place, each in enumerate(workflow.calls):
        begins = max((ends[before] for before in each.after), default=0.0) + each.wait_s
        assert clerk.began[f"c{place}"] == pytest.approx(begins)
        ends.append(begins + takes[f"c{place}"])
    assert figures.e2e_s.max == pytest.approx(max(ends))


def test_what_follows_a_refused_call_is_not_asked_for() -> None:
    clerk = Clerk({}, refused=frozenset({"b"}))
    found = clerk.play(flow(call("a"), call("b", 0), call("c", 1), call("d", 0)))
    assert set(clerk.began) == {"a", "b", "d"} and set(clerk.ended) == {"a", "d"}
    figures = found.figures()["program"]
    assert (figures.num, figures.num_whole, figures.num_calls, figures.e2e_s.num) == (1, 0, 3, 0)


def test_a_caller_gives_up_once_and_for_all() -> None:
    clerk = Clerk({"a": 5.0, "b": 5.0})
    found = clerk.play(flow(call("a", abandon_s=2.0), call("b", abandon_s=9.0), call("c", 0)))
    assert clerk.cut == pytest.approx({"a": 2.0}) and set(clerk.ended) == {"b"}
    assert found.figures()["program"].num_abandoned == 1


def test_cancelling_a_workflow_cancels_its_calls() -> None:
    clerk = Clerk({"a": 50.0, "b": 50.0})

    async def main() -> None:
        task = asyncio.create_task(Workflows(clerk.ask).play(flow(call("a"), call("b")), now()))
        await asyncio.sleep(3.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert clerk.cut == {"a": 3.0, "b": 3.0}


def test_a_bug_in_a_call_is_not_swallowed() -> None:
    async def ask(request: Request, at: float) -> bool:
        raise RuntimeError("a bug")

    async def main() -> None:
        await Workflows(ask).play(flow(call("a")), now())

    with pytest.raises(RuntimeError, match="a bug"):
        run(main())


@pytest.mark.parametrize("after", [(1,), (0,), (-1,), (5,)])
def test_calls_wait_for_earlier_ones_only(after: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot wait for call"):
        flow(call("a", *after), call("b"))


# ------------------------------------------------------------------ on the real fleet, modelled


class Ear:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def played(path: Path, *sets: str) -> tuple[Played, list[Report], list[Event]]:
    """Play a workload on one modelled replica: what came of it, and the replica's last word."""
    config, ear = load_config(EXAMPLE, sets=["fleet.0.replicas=1", *sets]), Ear()

    async def main() -> tuple[Played, list[Report]]:
        service = await assemble(config, modelled_leaves(config, ear))
        try:
            found = await play(open_trace(path, model="llama-3.1-8b"), service)
            await service.drain()
            await asyncio.sleep(5.0)
            return found, list(service.reports())
        finally:
            await service.stop()

    found, reports = run(main())
    return found, reports, ear.events


def test_callers_that_give_up_leave_nothing_in_the_replica(tmp_path: Path) -> None:
    text = """
num_requests = 150
arrivals = {kind = "poisson", rate_per_s = 40.0}
lengths = {kind = "fixed", prompt = 2000, output = 300}
prefix = {number = 2, tokens = 640}
failures = {patience_s = {kind = "exponential", mean = 4.0}, impatient = 0.7}
"""
    found, reports, events = played(workload(tmp_path, text), "fleet.0.cache.num_blocks=1500")
    figures = found.workflows["call"]
    assert 20 < figures.num_abandoned < figures.num
    assert found.num_served == found.num_sent - figures.num_abandoned == 150 - figures.num_abandoned
    assert found.errors == {}
    (report,) = reports
    assert report.num_running == report.num_waiting == 0
    assert report.free_blocks == report.total_blocks == 1500
    ended = [event for event in events if isinstance(event, Finished)]
    assert sum(event.reason == "cancelled" for event in ended) == figures.num_abandoned
    assert (
        len({event.request for event in events if isinstance(event, Cancelled)})
        == figures.num_abandoned
    )


def test_later_turns_find_the_earlier_ones_in_the_cache(tmp_path: Path) -> None:
    text = """
num_requests = 60
arrivals = {kind = "poisson", rate_per_s = 0.2}
lengths = {kind = "fixed", prompt = 640, output = 64}
sessions = {turns = 4, think_s = 3.0}
"""
    path = workload(tmp_path, text)
    found = simulate(
        load_config(EXAMPLE, sets=["fleet.0.replicas=1"]), open_trace(path, model="llama-3.1-8b")
    )
    total = found.figures.all
    # Turn k finds turn k-1's prompt: 0 + 640 + 1344 + 2048 of 640 + 1344 + 2048 + 2752 tokens; answers are not hashed.
    assert total.prefix_hit_rate == pytest.approx(
        (640 + 1344 + 2048) / (640 + 1344 + 2048 + 2752), abs=0.02
    )
    assert found.played.workflows["session"].num_whole == 15
    assert found.to_dict()["played"]["workflows"]["session"]["num_calls"] == 60  # type: ignore[index]


def test_equal_seeds_give_equal_simulations(tmp_path: Path) -> None:
    text = f"duration_s = 4\n{POISSON}{FIXED}programs = {{shape = 'fan_out', width = 3, wait_s = 0.5}}\n"
    path, config = workload(tmp_path, text), load_config(EXAMPLE)
    runs = {simulate(config, open_trace(path, model="llama-3.1-8b")).digest for _ in range(2)}
    other = simulate(config, open_trace(path, model="llama-3.1-8b", seed=1)).digest
    assert len(runs) == 1 and other not in runs


class Full:
    """A service that refuses everything."""

    async def submit(self, request: Request, on_output: object = None) -> None:
        raise Overloaded("no room")


def test_refusals_of_workflows_are_counted_like_others() -> None:
    found = run(play([(0.0, flow(call("a"), call("b", 0)))], Full()))  # type: ignore[arg-type]
    assert (found.num_sent, found.num_served, found.errors) == (1, 0, {"Overloaded": 1})


# ------------------------------------------------------------------ over a socket


async def test_a_bench_asks_for_the_next_call_when_the_last_has_ended(tmp_path: Path) -> None:
    text = f"num_requests = 3\n{POISSON}{FIXED}sessions = {{turns = 3, think_s = 0.05}}"
    little = Little(prefill_s=0.05, token_s=0.002)
    async with serving(little) as url:
        found = await bench(Bench(url=url, trace=workload(tmp_path, text)))
    assert found.workflows["session"].num_whole == 1 and found.figures.all.num_finished == 3
    assert len(little.bodies) == 3 and little.most_open == 1
    first, second, third = (body["prompt"] for body in little.bodies)
    assert len(second) > len(first) and second.startswith(first[: len(first) // 2])
    assert third.startswith(second[: len(second) // 2])
    gaps = [after - before for before, after in zip(little.at, little.at[1:], strict=False)]
    assert min(gaps) >= 0.05 + 0.05 + 19 * 0.002


async def test_a_bench_gives_up(tmp_path: Path) -> None:
    text = f"num_requests = 2\n{POISSON}{FIXED}failures = {{patience_s = 0.2}}"
    little = Little(prefill_s=0.8)
    async with serving(little) as url:
        found = await bench(Bench(url=url, trace=workload(tmp_path, text)))
    total = found.figures.all
    assert (total.num_offered, total.num_cancelled, total.num_finished) == (2, 2, 0)
    assert found.workflows["call"].num_abandoned == 2 == little.num_cut
