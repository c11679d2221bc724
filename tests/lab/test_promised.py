"""What counts as in time, on events written by hand and on a service that has time for everybody."""

from __future__ import annotations

import pytest

from penstock.core.arrivals import arrival_of
from penstock.core.events import Completed, Finished
from penstock.core.types import ProgramId, Request, Slo
from penstock.lab.promised import Offer, Scores, due_of, in_time
from penstock.lab.promised_mix import change_of, offers_of, request_of, run_of
from penstock.lab.trial import deployment

STREAM = Slo(ttft_s=1.0, tpot_s=0.1)


def play(scores: Scores, request: Request, at: float, ends: list[float]) -> None:
    """It gets a token at each of `ends`, and ends if that is all."""
    seq = len(scores._by_seq)
    scores.emit(arrival_of(request, at=at, who="replica-0", seq=seq, hashes=()))
    for end in ends:
        outputs = ((seq, 1, False, ()),)
        scores.emit(Completed(at=end, who="r", plan=0, steps_run=1, ends=(end,), outputs=outputs))
    if len(ends) == request.true_output:
        scores.emit(
            Finished(
                at=ends[-1],
                who="r",
                request=request.id,
                answer=0,
                reason="stop",
                arrived_at=at,
                admitted_at=at,
                first_token_at=ends[0],
                last_token_at=ends[-1],
                num_prompt=1,
                num_cached=0,
                num_output=len(ends),
                num_preemptions=0,
                tenant="t",
                priority=0,
                slo=request.slo,
            )  # fmt: skip
        )


def test_tokens_of_a_stream_count_one_by_one() -> None:
    request = request_of("s", (10, 4), STREAM)
    offers: list[Offer] = [(2.0, request)]
    scores = Scores(offers)
    play(scores, request, 2.0, [2.9, 3.2, 3.2, 3.3])  # due at 3.0, 3.1, 3.2, 3.3
    score = scores.judge(offers, 100.0)["stream"]
    assert (score.tokens, score.good_tokens, score.num, score.num_good) == (4, 3, 1, 0)
    assert not scores.judge(offers, 3.39)["stream"].num, "it may take until 3.4"


def test_answers_and_runs_are_whole_or_nothing() -> None:
    answer = request_of("a", (10, 2), Slo(deadline_s=5.0))
    run = run_of(ProgramId("p"), 2, iter([(10, 2), (10, 3)]))
    offers: list[Offer] = [(0.0, answer), (0.0, run)]
    assert due_of(run) == ("run", pytest.approx(26.6))
    scores = Scores(offers)
    play(scores, answer, 0.0, [4.0, 5.1])
    for call, at in zip(run.calls, (0.0, 20.0), strict=True):
        output = call.request.true_output or 0
        play(scores, call.request, at, [at + 6.0] * output)
    found = scores.judge(offers, 100.0)
    assert (found["answer"].tokens, found["answer"].good_tokens) == (2, 0)
    assert (found["run"].tokens, found["run"].num_good) == (5, 1)
    late = Scores(offers)
    play(late, run.calls[0].request, 0.0, [6.0, 6.0])
    assert late.judge(offers, 100.0)["run"].good_tokens == 0


def test_everything_is_in_time_where_there_is_time() -> None:
    offers = offers_of(None, 1, 1.0, 25.0)
    policy = {"preset": "jitserve", "batch": {"name": "jit", "max_sequences": 64}}
    figures = in_time(
        deployment(policy), offers, window_s=25.0, change=change_of("jitserve", None, 1)
    )
    assert (
        figures["good_requests"] == 1.0
        and figures["good_tokens_per_s"] == figures["due_tokens_per_s"]
    )
    assert 0 < float(str(figures["num_bounds"]))
    true = in_time(
        deployment(policy), offers, window_s=25.0, change=change_of("jitserve, true", None, 1)
    )
    assert true["violated"] == 0.0


def test_promises_are_those_of_the_classes() -> None:
    offers = offers_of(None, 3, 5.0, 200.0)
    kinds = [due_of(item)[0] for _, item in offers]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in ("stream", "answer", "run")}
    assert shares == pytest.approx({"stream": 0.5, "answer": 0.3, "run": 0.2}, abs=0.06)
