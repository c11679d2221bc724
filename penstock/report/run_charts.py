"""Charts of one run, or of a few side by side: over time, by cause, by class and tenant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.report.causes import CAUSES, Explanation
from penstock.report.charts import line
from penstock.report.collect import Band
from penstock.report.page import Chart
from penstock.report.series import Curve
from penstock.report.summary import GroupFigures

# Causes that are told apart by colour: the others share the one of the group they belong to.
TONE_OF_CAUSE = {
    "decode": "1", "batch": "6", "prefill": "3", "shared-prefill": "5", "interference": "2", "queue-max-jobs": "4",
    "queue-tokens": "4", "queue-blocks": "4", "queue-policy": "4", "step-boundary": "7", "preempted": "8",
    "recompute": "8", "passed-over": "muted", "between-steps": "muted", "routing": "muted",
    "elsewhere": "muted", "encode": "3", "encode-queue": "4", "transfer": "muted",
}  # fmt: skip
GROUPS: dict[str, tuple[str, ...]] = {
    "decode": ("decode",),
    "bigger batch": ("batch",),
    "own prefill": ("prefill",),
    "shared prefill": ("shared-prefill",),
    "prefill interference": ("interference",),
    "queueing": ("queue-max-jobs", "queue-tokens", "queue-blocks", "queue-policy", "encode-queue"),
    "images": ("encode",),
    "step boundary": ("step-boundary",),
    "preemption": ("preempted", "recompute"),
    "other": ("passed-over", "between-steps", "routing", "elsewhere", "transfer"),
}
assert set(CAUSES) == {cause for causes in GROUPS.values() for cause in causes}
MAX_BARS = 12


def time_chart(curves: Sequence[Curve], width_s: float) -> Chart:
    """Running, waiting and KV memory of each replica, one above the other, on one axis of time."""
    has_memory = all(curve.memory is not None for curve in curves)
    rows: list[tuple[str, str]] = [("running", "running"), ("waiting", "waiting")]
    if has_memory:
        rows.append(("memory", "KV memory"))
    gap, num = 0.06, len(rows)
    height = (1 - gap * (num - 1)) / num
    layout: dict[str, object] = {
        "xaxis": {"title": {"text": "time, s"}, "anchor": f"y{num}" if num > 1 else "y"},
        "hovermode": "x unified",
    }
    traces: list[dict[str, object]] = []
    for i, (field, label) in enumerate(rows):
        axis = "" if i == 0 else str(i + 1)
        top = 1 - i * (height + gap)
        layout[f"yaxis{axis}"] = {
            "domain": [max(0.0, top - height), top],
            "title": {"text": label},
            "rangemode": "tozero",
            "anchor": "x",
            **({"tickformat": ".0%"} if field == "memory" else {"tickformat": "d", "nticks": 5}),
        }
        for place, curve in enumerate(curves):
            more: dict[str, object] = {
                "yaxis": f"y{axis}",
                "line": {"width": 1.4, "shape": "hv"},
                "showlegend": i == 0 and len(curves) > 1,
            }
            traces.append(
                line(curve.at_s, getattr(curve, field), curve.name, place=place, more=more)
            )
    return Chart(
        title="Inside the replicas over time",
        caption=f"Answers running in the batch, answers waiting for a place in it, and the share of KV blocks in use. "
        f"Each point is the highest of {width_s:g} s. Waiting beside full memory: too few blocks; waiting beside free "
        "memory: a limit of the batch.",
        data=tuple(traces),
        layout=layout,
        height=190 * num,
        is_wide=True,
    )


def grouped(parts: Mapping[str, float]) -> dict[str, float]:
    """Seconds by the groups of the charts."""
    return {name: sum(parts.get(cause, 0.0) for cause in causes) for name, causes in GROUPS.items()}


def _stacks(
    bars: Sequence[tuple[str, Mapping[str, float]]], hover: str
) -> tuple[dict[str, object], ...]:
    """Horizontal bars from the top down, a segment a group of causes."""
    found = [(label, grouped(parts)) for label, parts in reversed(bars)]
    traces = []
    for name, causes in GROUPS.items():
        values = [float(f"{groups[name]:.5g}") for _, groups in found]
        if not any(values):
            continue
        traces.append({
            "type": "bar", "orientation": "h", "name": name, "x": values, "y": [label for label, _ in found],
            "meta": {"tone": TONE_OF_CAUSE[causes[0]]}, "hovertemplate": hover, "width": 0.7,
        })  # fmt: skip
    return tuple(traces)


def _bar_layout(title: str) -> dict[str, object]:
    return {
        "hovermode": "closest",
        "xaxis": {"title": {"text": title}, "rangemode": "tozero"},
        "yaxis": {"type": "category", "showgrid": False, "automargin": True},
        "legend": {"traceorder": "normal"},
    }


def bands_chart(bands: Sequence[tuple[str, Band]]) -> Chart:
    """Mean seconds by cause of quick and slow answers. Each band comes with its label."""
    bars = [(f"{label}  ({band.num:,})", band.parts) for label, band in bands]
    return Chart(
        title="Where the time went",
        caption="Mean seconds of an answer, by cause, from the quickest to the slowest answers (number of answers in "
        "brackets). Decode and own prefill are an answer's own work, the rest is what others, memory and the policies "
        "cost it. Shared prefill: others' prompts in the steps of its own. Prefill interference: its decode steps, "
        "stretched by others' prompts. Step boundary: until the step that ran when it came had ended.",
        data=_stacks(bars, "%{x:.3g} s"),
        layout=_bar_layout("mean seconds of an answer"),
        height=130 + 44 * len(bars),
        is_wide=True,
    )


def slowest_chart(slowest: Sequence[tuple[str, Explanation]]) -> Chart:
    """The life of each of the slowest answers, the worst on top. Each comes with its label."""
    bars = [(label, told.parts) for label, told in slowest[:MAX_BARS]]
    return Chart(
        title="The slowest answers",
        caption="Ranked by how far their worst promise was overdrawn, then by the seconds that were not their own "
        "work. The table below has the numbers and the words of the policies.",
        data=_stacks(bars, "%{x:.3g} s"),
        layout=_bar_layout("seconds from arrival to last token"),
        height=130 + 30 * len(bars),
        is_wide=True,
    )


def attainment_chart(whole: GroupFigures, groups: Mapping[str, GroupFigures], goal: float) -> Chart:
    """The share of kept promises of all, and of each class or tenant, the worst on top."""
    rows = [("all, by count", whole)]
    known = {name: found for name, found in groups.items() if found.attainment is not None}
    ordered = sorted(known.items(), key=lambda item: item[1].attainment or 0.0)
    rows += ordered[:MAX_BARS]
    rows.reverse()
    values = [round(found.attainment or 0.0, 4) for _, found in rows]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": [name for name, _ in rows],
        "width": 0.62,
        "meta": {"tones": ["1" if value >= goal else "2" for value in values]},
        "text": [f"{value:.1%}" for value in values],
        "textposition": "auto",
        "customdata": [[found.num_offered] for _, found in rows],
        "hovertemplate": "%{x:.2%} of %{customdata[0]:,}<extra></extra>",
        "showlegend": False,
    }
    goal_line = {
        "type": "line",
        "x0": goal,
        "x1": goal,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "name": "ink",
    }
    return Chart(
        title="Who kept their promise",
        caption="Share of offered answers that kept all their promises; refused and failed ones count as misses. "
        f"The dashed line is {goal:.0%}. The first bar counts all answers alike, the others show who pays "
        "for that mean.",
        data=(trace,),
        layout={
            "hovermode": "closest",
            "xaxis": {"range": [0, 1], "tickformat": ".0%"},
            "yaxis": {"type": "category", "showgrid": False, "automargin": True},
            "shapes": [goal_line],
        },
        height=90 + 36 * len(rows),
        is_wide=True,
    )
