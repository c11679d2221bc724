"""Agent programs: their shapes, and what their prompts are chained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.errors import BadConfig
from penstock.core.types import Request
from penstock.traffic import Workflow
from tests.traffic.written_workloads import FIXED, POISSON, opened, workflows_of

SIZE = 64


def programs(folder: Path, text: str, extra: str = "") -> list[Workflow]:
    return workflows_of(
        opened(folder, f"num_requests = 40\n{POISSON}{FIXED}{extra}\n[programs]\n{text}")
    )


def shared(one: Request, other: Request) -> int:
    """Tokens of the common beginning, in whole blocks."""
    pairs = zip(one.prompt.blocks(SIZE), other.prompt.blocks(SIZE), strict=False)
    return SIZE * sum(a == b for a, b in pairs)


def whole_blocks(tokens: int) -> int:
    return tokens // SIZE * SIZE


def test_a_chain_grows_by_answers_and_tool_results(tmp_path: Path) -> None:
    for flow in programs(tmp_path, "calls = 4\nwait_s = 2.0"):
        assert [call.after for call in flow.calls] == [(), (0,), (1,), (2,)]
        assert [call.wait_s for call in flow.calls] == [0.0, 2.0, 2.0, 2.0]
        sizes = [call.request.prompt.num_tokens for call in flow.calls]
        assert sizes == [100, 220, 340, 460]
        requests = [call.request for call in flow.calls]
        for before, after in zip(requests, requests[1:], strict=False):
            assert shared(before, after) == whole_blocks(before.prompt.num_tokens)


def test_a_fan_out_reads_the_plan_and_the_answers(tmp_path: Path) -> None:
    (flow, *_) = programs(tmp_path, 'shape = "fan_out"\nwidth = 3')
    assert [call.after for call in flow.calls] == [(), (0,), (0,), (0,), (0, 1, 2, 3)]
    plan, *workers, join = (call.request for call in flow.calls)
    assert [each.prompt.num_tokens for each in workers] == [100 + 20 + 100] * 3
    assert join.prompt.num_tokens == 100 + 20 + 3 * 20 + 100
    assert {shared(plan, each) for each in (*workers, join)} == {64}
    assert shared(workers[0], workers[1]) == shared(workers[0], join) == 64


def test_fresh_contexts_share_the_opening_only(tmp_path: Path) -> None:
    extra = 'prefix = {tokens = 640, counts = "added"}'
    for flow in programs(tmp_path, 'calls = 3\ncontext = "fresh"', extra):
        requests = [call.request for call in flow.calls]
        assert [each.prompt.num_tokens for each in requests] == [740] * 3
        assert shared(requests[0], requests[1]) == shared(requests[1], requests[2]) == 640


DAG = """
shape = "dag"
[[programs.call]]
name = "plan"
prompt = 1000
output = 200
[[programs.call]]
name = "search"
after = ["plan"]
wait_s = 3
[[programs.call]]
name = "code"
after = ["plan"]
output = 500
[[programs.call]]
name = "review"
after = ["plan", "search", "code"]
on = "code"
prompt = 10
"""


def test_a_graph_is_as_listed(tmp_path: Path) -> None:
    for flow in programs(tmp_path, DAG):
        plan, search, code, review = flow.calls
        assert [set(each.after) for each in flow.calls] == [set(), {0}, {0}, {0, 1, 2}]
        assert (search.wait_s, code.wait_s) == (3.0, 0.0)
        sizes = [(c.request.prompt.num_tokens, c.request.true_output) for c in flow.calls]
        # review: all of code (1300 + 500), the answers of plan and search, 10 of its own.
        assert sizes == [(1000, 200), (1300, 20), (1300, 500), (1800 + 200 + 20 + 10, 20)]
        assert shared(code.request, review.request) == whole_blocks(1300)
        assert shared(search.request, review.request) == whole_blocks(1200)
        assert shared(plan.request, search.request) == whole_blocks(1000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('shape = "dag"', 'goes with \\[\\[programs.call\\]\\]'),
        ('[[programs.call]]\nname = "a"', 'goes with \\[\\[programs.call\\]\\]'),
        (DAG.replace('after = ["plan"]', 'after = ["pan"]'), "waits for 'pan', which is not listed"),
        (DAG.replace('on = "code"', 'on = "cod"'), "does not wait for it"),
        (DAG.replace('name = "code"', 'name = "plan"'), "two calls are named 'plan'"),
        ('shape = "loop"', "must be one of"),
        ("calls = {kind = 'geometric', mean = 0.5}", "mean of at least 1"),
    ],
)  # fmt: skip
def test_graphs_that_cannot_be_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        programs(tmp_path, text)
