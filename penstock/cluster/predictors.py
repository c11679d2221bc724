"""What a replica's policies may ask about the outside, and what a modelled executor's time comes from.

In this order: the profile of this machine, operator tables measured on the named card, its roofline, and for an engine
with none of these a rough prior
(PRIOR_BYTES_S, PRIOR_FLOPS) that ranks work by size and is not to be believed in seconds. Each is imported where it is
asked for: starting up takes a second already.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.cluster.spec import ExecutorSpec
from penstock.core.errors import BadConfig
from penstock.core.types import Request, StepTemplate
from penstock.core.views import Lengths
from penstock.cost import engines
from penstock.cost.energy import EnergyMeter, at_clock
from penstock.cost.engines import Engine
from penstock.cost.hardware import Card, card_of
from penstock.cost.lengths import History, RecentLengths
from penstock.cost.linear_five import LINEAR_CARD, LINEAR_TABLES, LinearFive, linear_five
from penstock.cost.predict import StepPredictor
from penstock.cost.programs import SeenPrograms
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import ModelShape, in_weights, shape_of
from penstock.cost.step import StepModel
from penstock.cost.warmup import ColdStart
from penstock.engine.folder import local_folder
from penstock.engine.turn import Predictors

if TYPE_CHECKING:
    from penstock.cost.fitted import Fitted
    from penstock.cost.forest import ForestLengths
    from penstock.cost.nano_model import NanoModel
    from penstock.cost.profile import Profile
    from penstock.cost.schedulers import Charged
    from penstock.cost.table import TableModel

PRIOR_BYTES_S = 20e9  # of a small CPU server
PRIOR_FLOPS = 100e9
LEARNED = 20_000


def profile_of(executor: ExecutorSpec) -> Profile | None:
    if executor.profile is None:
        return None
    from penstock.cost.profile import load_profile

    return load_profile(Path(executor.profile))


def scheduler_of(
    executor: ExecutorSpec, policies: Mapping[str, Mapping[str, object]]
) -> Charged | None:
    """What a modelled replica is charged for deciding a step; None = nothing is known, so nothing is charged."""
    if executor.scheduler is None and executor.profile is None:
        return None
    from penstock.cost import schedulers

    if executor.scheduler is not None:
        return schedulers.scheduler_of(executor.scheduler, schedulers.policies_name(policies))
    profile = profile_of(executor)
    if profile is None or profile.scheduler is None:
        return None
    return schedulers.Charged(cost=profile.scheduler, source="the profile")


def step_model(executor: ExecutorSpec, shape: ModelShape) -> StepModel:
    """The model of step times. Raises BadConfig when a modelled executor names nothing to take them from."""
    profile = profile_of(executor)
    if profile is not None:
        return profile.step_model(shape)
    if executor.tables in LINEAR_TABLES:
        return _linear_five(executor, shape)
    if executor.op_tables is not None or executor.tables is not None:
        return _table_model(executor, shape)
    if executor.gpu is not None:
        card = at_clock(card_of(executor.gpu), executor.clock)
        few = in_weights(shape, executor.weights)
        return _roofline(few, card, executor.tensor_parallel)
    if executor.kind == "modelled":
        raise BadConfig(
            "a modelled executor needs `gpu` or `profile`",
            hint='for example --set fleet.0.executor.gpu="a100-80g"',
        )
    return _prior(in_weights(shape, executor.weights))


@functools.lru_cache(maxsize=32)
def _roofline(shape: ModelShape, card: Card, tp: int) -> Roofline:
    """Replicas that are alike share one, and what it has worked out for steps of each size."""
    return Roofline(shape, card, tp=tp)


def executed(executor: ExecutorSpec, shape: ModelShape) -> StepModel:
    """What a modelled executor takes: the step model, and what a fresh process of the engine adds at first."""
    model = step_model(executor, shape)
    engine = engine_of(executor)
    return ColdStart(model, engine.first_step_s) if engine.first_step_s else model


def templates_of(
    executor: ExecutorSpec, shape: ModelShape, num_lanes: int = 1
) -> dict[StepTemplate, NanoModel]:
    """What steps cost under each of the executor's templates, the smallest first. Raises BadConfig for another's."""
    if not executor.templates:
        return {}
    from penstock.cost.nano_model import NanoModel
    from penstock.cost.nano_template import read_template

    if num_lanes > 1:
        raise BadConfig(
            "templates cut a step of the whole device, and lanes share it",
            hint="leave `templates` or `lanes` out",
        )
    plain = step_model(executor, shape)
    found: dict[StepTemplate, NanoModel] = {}
    for path in executor.templates:
        template = read_template(path.expanduser())
        model = NanoModel(plain, template)
        if template.digest != model.times.digest:
            raise BadConfig(
                f"{path} was searched for {template.model} on {template.tp} {template.card}, not for {plain.name} "
                "as it is configured here",
                hint="search one for this deployment: penstock plan pipeline CONFIG",
            )
        found[StepTemplate(template.tokens, template.name)] = model
    return dict(sorted(found.items()))


def engine_of(executor: ExecutorSpec) -> Engine:
    """Of executors with operator tables; a profile was measured with its engine, the roofline has a host of its own."""
    is_table = executor.op_tables is not None or executor.tables == "aiconfigurator"
    if executor.engine is None or executor.profile is not None or not is_table:
        return Engine()
    return engines.engine_of(executor.engine).with_costs(executor.engine_costs)


def _linear_five(executor: ExecutorSpec, shape: ModelShape) -> LinearFive:
    """Published for one card and two models."""
    assert executor.tables is not None
    if executor.gpu != LINEAR_CARD or executor.clock != 1.0:
        raise BadConfig(
            f"the step times {executor.tables!r} are of {LINEAR_CARD} at its full clock, not of {executor.gpu}",
            hint=f'set executor.gpu = "{LINEAR_CARD}"',
        )
    engine, tp = LINEAR_TABLES[executor.tables], executor.tensor_parallel
    return linear_five(engine, shape.name, tp, num_layers=shape.layers)


def _table_model(executor: ExecutorSpec, shape: ModelShape) -> TableModel:
    """Raises BadConfig where card, tables and model do not fit each other."""
    if executor.gpu is None:
        raise BadConfig(
            "operator tables need `gpu`, the card that they were measured on",
            hint='for example --set fleet.0.executor.gpu="rtx-pro-6000"',
        )
    if executor.clock != 1.0:
        raise BadConfig("operator tables were measured at the full clock; leave `clock` out")
    from penstock.cost.configurator import read_configurator
    from penstock.cost.op_tables import read_op_tables
    from penstock.cost.table import TableModel

    card, tp = card_of(executor.gpu), executor.tensor_parallel
    if executor.op_tables is not None:
        tables = read_op_tables(Path(executor.op_tables).expanduser())
    else:
        tables = read_configurator(shape, card, tp=tp, engine=executor.engine)
    return TableModel(tables, shape, card, tp=tp, engine=engine_of(executor))


def meter_of(executor: ExecutorSpec, shape: ModelShape) -> EnergyMeter | None:
    """None when no card is named, so that nobody knows what it draws."""
    if executor.gpu is None or executor.profile is not None:
        return None
    card = at_clock(card_of(executor.gpu), executor.clock)
    return EnergyMeter(shape, card, tp=executor.tensor_parallel)


def _prior(shape: ModelShape) -> Fitted:
    from penstock.cost.fitted import Fitted

    return Fitted(
        {
            "step": shape.weight_bytes / PRIOR_BYTES_S,
            "token": shape.flops_per_token / PRIOR_FLOPS,
            "decode_context": shape.kv_bytes / PRIOR_BYTES_S,
        },
        name="rough prior",
        digest="",
        num_layers=shape.layers,
        shape=shape,
    )


def predictors_of(
    executor: ExecutorSpec, shape: ModelShape, history: History | None = None
) -> Predictors:
    cost = StepPredictor(step_model(executor, shape), shape.layers)
    lengths: Lengths = RecentLengths(history)
    if history is not None and history.trained_on is not None:
        lengths = forest_of(history.trained_on)
    return Predictors(cost=cost, lengths=lengths, programs=SeenPrograms())


@functools.cache
def forest_of(trace: str) -> ForestLengths:
    """Learned once a process from the first LEARNED requests of a trace."""
    from penstock.cost.forest import ForestLengths
    from penstock.traffic import open_trace

    items = (item for _, item in open_trace(Path(trace), limit=LEARNED, rate_per_s=1.0))
    return ForestLengths(
        [
            (item.prompt.num_tokens, item.true_output)
            for item in items
            if isinstance(item, Request) and item.true_output
        ]
    )


def shape_of_model(model: str, executor: ExecutorSpec | None = None) -> ModelShape:
    """The shape of a model by its folder, "default", or the name of a known shape. Raises BadModel.

    Its keys and values are as `executor` keeps them.
    """
    folder = local_folder(model)
    shape = shape_of(model if folder is None else str(folder))
    return shape.with_int8_kv() if executor is not None and executor.kv == "int8" else shape


def predictors_of_model(
    executor: ExecutorSpec, model: str, history: History | None = None
) -> Predictors:
    return predictors_of(executor, shape_of_model(model, executor), history)
