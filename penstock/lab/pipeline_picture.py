"""One period of a pipeline, as lines of text and as a picture: a lane a resource, time to the right.

    compute  Q11G1111111111D11111O2Q22G222222222222D22222222O1
    memory   A1111111..............A2222222222222.............
    network  ..s2222222222.....o1111..........s1111111111.o222

A letter begins a nano-operation and says which (LETTERS), the digits behind it its nano-batch; a dot is idle.
"""

from __future__ import annotations

from pathlib import Path

from penstock.cost.nano_layer import RESOURCES, USES, NanoOp, Resource, nano_ops
from penstock.cost.nano_template import Template
from penstock.lab.pipeline import Planned
from penstock.report.files import new_figure, save_figure

LETTERS = {
    "qkv": "Q",
    "decode attention": "A",
    "prefill attention": "P",
    "out": "O",
    "out sum": "o",
    "gate up": "G",
    "down": "D",
    "down sum": "d",
}
COLOURS = {"compute": "#0072b2", "memory": "#d55e00", "network": "#009e73"}
WIDTH = 96


def batch_of(op: NanoOp, template: Template) -> int:
    """Which nano-batch it belongs to, from 1."""
    ends = [sum(map(sum, template.pieces[: place + 1])) for place in range(len(template.pieces))]
    return 1 + next(place for place, end in enumerate(ends) if op.end <= end)


def lanes(planned: Planned, width: int = WIDTH) -> dict[Resource, str]:
    """A line of `width` characters for each resource that is used."""
    template = planned.template
    ops = nano_ops(template.split, template.tp)
    found: dict[Resource, str] = {}
    for resource in RESOURCES:
        mine = [span for span in planned.spans if ops[span.number].resource == resource]
        if not mine:
            continue
        line, before = "", None
        for column in range(width):
            at = (column + 0.5) * template.period_s / width
            span = next((each for each in mine if each.start <= at < each.end), None)
            if span is None:
                line += "."
            elif span is before:
                line += str(batch_of(ops[span.number], template))
            else:
                line += LETTERS[ops[span.number].operator]
            before = span
        found[resource] = line
    return found


def text_of(planned: Planned) -> str:
    """What was found, for people."""
    made = planned.template
    cut = " + ".join(
        f"{sum(each):,}" + (f" (front {'+'.join(map(str, each))})" if len(each) > 1 else "")
        for each in made.pieces
    )
    load = planned.load
    context = load.decode_context / max(1, load.decodes)
    lines = [
        f"pipeline  {made.name}",
        f"for       {made.model} on {made.tp} {made.card}, sharing {made.sharing!r}: modelled, nothing ran",
        f"batch     {made.tokens:,} tokens: {load.decodes:,} decodes at {context:,.0f} positions, {load.prefills:,} of "
        "prompts",
        f"cut into  {cut}",
        f"a layer   {1e3 * made.period_s:.3f} ms; operator after operator {1e3 * made.uncut_s:.3f} "
        f"({made.gain:.3f}x); no pipeline is below {1e3 * made.bound_s:.3f} ({made.gap:.1%} above it)",
        f"without interference {1e3 * made.free_period_s:.3f} ms, bound {1e3 * made.free_bound_s:.3f}",
        f"search    {made.search_s:.0f} s of processor time",
    ]
    if planned.most_tokens is not None and made.tokens > planned.most_tokens:
        lines.append(
            f"warning   memory keeps a batch of about {planned.most_tokens:,} tokens full with these lengths; "
            "padding is computed"
        )
    lines += ["", f"{'':9} one period of {1e3 * made.period_s:.3f} ms"]
    lines += [f"{resource:9} {line}" for resource, line in lanes(planned).items()]
    names = [f"{letter} {name}" for name, letter in LETTERS.items() if _is_used(name, made)]
    return "\n".join([*lines, f"{'':9} {', '.join(names)}; digits are nano-batches"])


def _is_used(operator: str, template: Template) -> bool:
    return template.tp > 1 or USES[operator] != "network"


def plot(path: Path, planned: Planned) -> None:
    """Write a PNG (or what the suffix says). Raises MissingExtra without matplotlib."""
    template = planned.template
    ops = nano_ops(template.split, template.tp)
    figure = new_figure(12, 3)
    axes = figure.subplots()
    used = list(lanes(planned, 1))
    for span in planned.spans:
        op = ops[span.number]
        start, width = 1e3 * span.start, 1e3 * (span.end - span.start)
        lane = used.index(op.resource)
        axes.barh(lane, width, left=start, color=COLOURS[op.resource], edgecolor="white", alpha=0.8)
        if width > 0.02 * 1e3 * template.period_s:
            told = f"{LETTERS[op.operator]}{batch_of(op, template)}"
            axes.text(start + width / 2, lane, told, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(used)), used)
    axes.invert_yaxis()
    axes.set_xlabel("ms of one steady period")
    axes.set_title(f"{template.name}: {template.gain:.2f}x, modelled", loc="left", fontsize=9)
    save_figure(figure, path)
