"""What is told of agent runs, by runs whose course is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from penstock.core.events import Arrived, Finished
from penstock.core.types import Slo
from penstock.core.views import Outlook
from penstock.cost.programs import Recall, SeenPrograms

SHORT = [(100, 50), (100, 50)]
LONG = [(3000, 400)] * 5
PACE_S, WAIT_S = 0.01, 1.0


def arrive(seen: SeenPrograms, run: str, call: str, at: float, prompt: int) -> None:
    seen.observe(
        Arrived(
            at=at,
            who="replica-0",
            request=f"{run}.{call}",
            seq=0,
            model="m",
            num_prompt=prompt,
            max_tokens=500,
            n=1,
            tenant="t",
            priority=0,
            slo=Slo(deadline_s=10.0),
            program=run,
        )  # fmt: skip
    )


def finish(
    seen: SeenPrograms, run: str, call: str, at: float, output: int, reason: str = "stop"
) -> None:
    seen.observe(
        Finished(
            at=at,
            who="replica-0",
            request=f"{run}.{call}",
            answer=0,
            reason=reason,  # type: ignore[arg-type]
            arrived_at=0.0,
            admitted_at=0.0,
            first_token_at=None,
            last_token_at=None,
            num_prompt=1,
            num_cached=0,
            num_output=output,
            num_preemptions=0,
            tenant="t",
            priority=0,
            slo=Slo(),
        )  # fmt: skip
    )


def play(seen: SeenPrograms, run: str, calls: list[tuple[int, int]], at: float) -> None:
    for place, (prompt, output) in enumerate(calls):
        arrive(seen, run, str(place), at, prompt)
        at += PACE_S * output
        finish(seen, run, str(place), at, output)
        at += WAIT_S


def told(seen: SeenPrograms, run: str | None) -> Outlook | None:
    job: Any = SimpleNamespace(request=SimpleNamespace(program=run))
    return seen.outlook(job)


@pytest.fixture
def seen() -> SeenPrograms:
    """Twenty runs of each kind ended long ago."""
    found = SeenPrograms()
    for number in range(20):
        play(found, f"short{number}", SHORT, 200.0 * number)
        play(found, f"long{number}", LONG, 200.0 * number + 100)
    return found


def test_a_run_is_taken_for_one_of_those_that_began_alike(seen: SeenPrograms) -> None:
    arrive(seen, "new", "0", 10_000.0, 3000)
    outlook = told(seen, "new")
    assert outlook is not None
    assert outlook.stages_left == 4 and outlook.tokens_left == outlook.tokens_most == 1600
    assert outlook.waits_s == pytest.approx(4 * WAIT_S) and outlook.others == 1600
    assert outlook.deadline_at == 10_050.0
    # The first of five calls of 4 s with waits of 1 s ends after 4 of 24 s.
    assert outlook.due_at == pytest.approx(10_000 + 50 * 4 / 24)
    arrive(seen, "other", "0", 10_001.0, 100)
    assert told(seen, "other") == Outlook(1, 50, 50, WAIT_S, 50, 10_021.0, 10_001 + 20 * 0.5 / 2)


def test_what_has_ended_counts_and_what_is_left_shrinks(seen: SeenPrograms) -> None:
    play(seen, "new", LONG[:2], 10_000.0)
    arrive(seen, "new", "2", 10_010.0, 3000)
    outlook = told(seen, "new")
    assert outlook is not None
    assert (outlook.stages_left, outlook.tokens_left, outlook.others) == (2, 800, 1600)
    assert outlook.deadline_at == 10_050.0


def test_calls_under_way_together_are_one_stage() -> None:
    seen = SeenPrograms(Recall(enough=1, matches=1))
    arrive(seen, "old", "plan", 0.0, 10)
    finish(seen, "old", "plan", 1.0, 10)
    for worker in "ab":
        arrive(seen, "old", worker, 2.0, 10)
    finish(seen, "old", "a", 3.0, 30)
    finish(seen, "old", "b", 6.0, 70)
    arrive(seen, "new", "plan", 100.0, 10)
    outlook = told(seen, "new")
    assert outlook is not None
    assert outlook.stages_left == 1
    assert outlook.tokens_left == 70 and outlook.others == 100  # the longest; all of them


def test_runs_that_broke_or_may_go_on_teach_nothing() -> None:
    seen = SeenPrograms(Recall(enough=1, idle_s=30.0))
    arrive(seen, "broken", "0", 0.0, 10)
    finish(seen, "broken", "0", 1.0, 5, reason="cancelled")
    arrive(seen, "fresh", "0", 90.0, 10)
    finish(seen, "fresh", "0", 91.0, 5)
    arrive(seen, "new", "0", 100.0, 10)
    assert seen.num_patterns == 0
    assert told(seen, "new") == Outlook(0, 0, 0, 0, 0, 110.0, 110.0)
    arrive(seen, "later", "0", 130.0, 10)
    assert seen.num_patterns == 1
    assert told(seen, "broken") is None


def test_nothing_is_told_of_lone_jobs_and_of_runs_without_a_promise(seen: SeenPrograms) -> None:
    seen.observe(
        Arrived(
            at=1e5,
            who="r",
            request="chat.0",
            seq=0,
            model="m",
            num_prompt=5,
            max_tokens=5,
            n=1,
            tenant="t",
            priority=0,
            slo=Slo(ttft_s=1.0),
            program="chat",
        )  # fmt: skip
    )
    assert told(seen, None) is None and told(seen, "chat") is None and told(seen, "nobody") is None


def test_the_window_forgets_the_oldest() -> None:
    seen = SeenPrograms(Recall(window=10, enough=1, matches=10))
    for number in range(30):
        play(seen, f"long{number}", LONG, 100.0 * number)
    for number in range(10):
        play(seen, f"short{number}", SHORT, 10_000 + 100.0 * number)
    arrive(seen, "new", "0", 20_000.0, 3000)
    outlook = told(seen, "new")
    assert seen.num_patterns == 10 and outlook is not None and outlook.stages_left == 1
