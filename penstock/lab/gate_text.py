"""The gate in words: a table for each run, what its numbers rest on, and what is beyond its bounds."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.lab.gate import Gated
from penstock.lab.gate_scores import GATE, GOAL, PUBLISHED, PUBLISHED_FOR_ALL

COLUMNS = (
    ("TTFT mean", "ttft_mean"),
    ("p99", "ttft_p99"),
    ("MAPE", "ttft_mape"),
    ("not queued", "ttft_not_queued_mape"),
    ("TPOT mean", "tpot_mean"),
    ("p99", "tpot_p99"),
    ("MAPE", "tpot_mape"),
    ("E2E mean", "e2e_mean"),
    ("p99", "e2e_p99"),
    ("MAPE", "e2e_mape"),
)
WIDE = 32


def text_of(found: Sequence[Gated]) -> str:
    """All of it, ready to print."""
    lines = [line for one in found for line in (*_run(one), "")]
    through = sum(one.scores.is_through for one in found)
    bounds = ", ".join(f"{name} {bound:g} %" for name, bound in GATE.items())
    lines.append(f"gate ({bounds}): {through} of {len(found)} runs through")
    goals = [one for one in found if one.has_goal]
    if goals:
        reached = sum(not one.scores.beyond(GOAL) for one in goals)
        bounds = ", ".join(f"{name} {bound:g} %" for name, bound in GOAL.items())
        lines.append(f"goal ({bounds}): {reached} of {len(goals)} runs")
    return "\n".join(lines)


def _run(one: Gated) -> list[str]:
    log, constants = one.log, one.constants
    blocks = "as the card holds" if log.num_blocks is None else f"{log.num_blocks} as logged"
    lines = [
        f"{log.name}: {len(one.real)} requests, {log.engine} on {log.tp} x {log.card}, KV blocks {blocks}",
        f"  kernels   {one.tables}",
        f"  engine    prefill {constants.prefill_s * 1e3:.1f} ms, first step {constants.first_step_s * 1e3:.0f} ms, "
        f"fitted on {', '.join(constants.fitted_on) or 'nothing'}",
        f"  {'errors in %':{WIDE}}" + "".join(f"{name:>11}" for name, _ in COLUMNS),
    ]
    for name, scores in (
        ("Penstock", one.scores),
        ("Penstock, nothing fitted", one.unfitted),
        ("Penstock, roofline", one.roofline),
    ):
        told = {key: _signed(key, value) for key, value in scores.errors.items()}
        lines.append(_line(name, told))
    others = {**PUBLISHED.get(log.name, {}), **PUBLISHED_FOR_ALL}
    lines += [_line(name, told) for name, told in others.items()]
    lines.append(f"  not queued: {one.scores.num_not_queued} requests")
    beyond = one.scores.beyond(GATE) + (one.scores.beyond(GOAL) if one.has_goal else [])
    lines += [f"  beyond: {told}" for told in beyond]
    return lines


def _signed(key: str, value: float) -> str:
    return f"{value:.1f}" if key.endswith("mape") else f"{value:+.1f}"


def _line(name: str, told: dict[str, str]) -> str:
    return f"  {name:{WIDE}}" + "".join(f"{told.get(key, '-'):>11}" for _, key in COLUMNS)
