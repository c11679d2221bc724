"""A pipeline template for a deployment: what `penstock plan pipeline` searches, and what it tells of it.

The operator times are those that `penstock simulate` would charge the same configuration, so a template and its
deployment fit each other by construction. The load is a full dense batch in the long run, from the lengths of requests
alone (lab.nano_offline). A batch can only be full if memory holds the decodes that belong to it: without `tokens` it is
as large as that allows, in whole grains, up to the batch policy's own or MOST_TOKENS.

Everything is modelled, and so is what kernels do to each other (cost.nano_sharing).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from penstock.assemble import Config
from penstock.assemble.config import FleetConfig
from penstock.assemble.presets import policy_tables
from penstock.cluster.predictors import shape_of_model, step_model
from penstock.core.errors import BadConfig
from penstock.core.types import Request
from penstock.cost.hardware import card_of, num_blocks
from penstock.cost.nano_layer import Load, nano_ops, seconds_of
from penstock.cost.nano_play import Player, Span
from penstock.cost.nano_sharing import sharing_of
from penstock.cost.nano_template import Template
from penstock.cost.nano_times import times_of
from penstock.cost.shapes import ModelShape
from penstock.lab.nano_offline import Lengths, mean_context, mean_load
from penstock.lab.nano_polish import GRAIN, Task
from penstock.lab.nano_search import OnProgress, find_template
from penstock.traffic.workflow import Workflow

MOST_TOKENS = 2048
READ = 20_000  # requests of a trace
FILLED = 0.85  # of KV memory by the decodes of a full batch, in the mean
STEADY = 4  # the layer after which one period is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """`most_tokens`: of the largest batch that memory keeps full; None where nobody knows the memory."""

    template: Template
    load: Load
    most_tokens: int | None
    spans: tuple[Span, ...]  # of one period, from its beginning, in seconds

    def to_dict(self) -> dict[str, object]:
        return {
            "template": dataclasses.asdict(self.template),
            "load": dataclasses.asdict(self.load),
            "most_tokens": self.most_tokens,
            "gain": self.template.gain,
            "gap": self.template.gap,
        }


def lengths_of(offered: Iterable[tuple[float, Request | Workflow]]) -> Lengths:
    """(prompt, answer) tokens of the first READ requests of a trace; workflows are left out."""
    found = []
    requests = (request for _, request in offered if isinstance(request, Request))
    for request in islice(requests, READ):
        output = request.true_output or request.sampling.max_tokens
        if output is not None:
            found.append((request.prompt.num_tokens, output))
    if not found:
        raise BadConfig("the trace does not say how long its answers are")
    return found


def plan_pipeline(
    config: Config,
    lengths: Lengths,
    *,
    tokens: int | None = None,
    sharing: str = "paper",
    effort: str = "full",
    cache: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Planned:
    """Search for the first fleet, or read what was found before. Raises BadConfig, BadModel, MissingExtra."""
    fleet = config.fleet[0]
    executor = dataclasses.replace(fleet.executor, kind="modelled")
    shape = shape_of_model(fleet.model, fleet.executor)
    times = times_of(step_model(executor, shape))
    most = most_tokens(fleet, shape, lengths)
    if tokens is None:
        tokens = min(asked_tokens(fleet), most or MOST_TOKENS)
    if tokens < GRAIN:
        raise BadConfig(
            f"a dense batch needs at least {GRAIN} tokens, and this one has {tokens}",
            hint="more devices, shorter requests, or --tokens",
        )
    task = Task(mean_load(lengths, tokens), times, sharing_of(sharing))
    template = find_template(
        task,
        model=shape.name.replace("/", "-"),
        card=executor.gpu or "measured",
        effort=effort,
        cache=cache,
        on_progress=on_progress,
    )
    spans = one_period(template, task)
    return Planned(template=template, load=task.load, most_tokens=most, spans=spans)


def asked_tokens(fleet: FleetConfig) -> int:
    """The batch policy's max_tokens, where it says so."""
    asked = policy_tables(fleet.policy, fleet.cache.prefix)["batch"].get("max_tokens")
    return asked if isinstance(asked, int) else MOST_TOKENS


def most_tokens(fleet: FleetConfig, shape: ModelShape, lengths: Lengths) -> int | None:
    """In whole grains. The decodes of a full batch take FILLED of memory; one in the middle of its answer holds
    mean_context positions.
    """
    size, blocks = fleet.cache.block_size, fleet.cache.num_blocks
    if blocks is None and fleet.executor.gpu is not None and fleet.cache.memory_bytes is None:
        card = card_of(fleet.executor.gpu)
        blocks = num_blocks(card, shape, tp=fleet.executor.tensor_parallel, block_size=size)
    if blocks is None:
        return None
    decodes = FILLED * blocks * size / (mean_context(lengths) + size)
    outputs = sum(output for _, output in lengths)
    return (
        int(decodes * (sum(prompt for prompt, _ in lengths) + outputs) / outputs) // GRAIN * GRAIN
    )


def one_period(template: Template, task: Task) -> tuple[Span, ...]:
    """What runs between the ends of two layers in the steady state, cut to it."""
    schedule = template.schedule
    seconds = seconds_of(schedule.ops, task.load, task.times)
    spans = Player(schedule, task.sharing).spans(seconds)
    begin = max(span.end for span in spans if span.layer == STEADY)
    end = begin + template.period_s
    return tuple(
        Span(span.number, span.layer, max(0.0, span.start - begin), min(span.end, end) - begin)
        for span in sorted(spans, key=lambda each: each.start)
        if span.end > begin and span.start < end and span.end > span.start
    )


def operators(template: Template) -> list[str]:
    """What each number of a span stands for."""
    return [str(op) for op in nano_ops(template.split, template.tp)]
