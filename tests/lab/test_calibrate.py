"""Calibration: what is measured is what the executor does, and a fit finds the constants that made it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.__main__ import run as penstock
from penstock.assemble import load_config
from penstock.core.errors import BadConfig, BadTrace, StepFailed
from penstock.core.events import Completed, Stepped
from penstock.core.plans import Done, Sampled
from penstock.core.ports import Completion
from penstock.core.types import SCHEMA, Caps
from penstock.cost.fitted import Fitted, fit_steps
from penstock.cost.profile import Profile, load_profile
from penstock.lab.calibrate import Engine, calibrate, refit, time_schedulers
from penstock.lab.measure import Grid, measure_steps
from penstock.lab.refit import steps_of_log
from penstock.lab.scheduling import schedule_cost
from penstock.lab.simulate import simulate
from penstock.report.log import LogReader
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run
from penstock.traffic import open_trace

DATA = Path(__file__).parents[2] / "data"
TRUE = {
    "step": 4e-3, "token": 2e-5, "token_past_64": 3e-5, "decode_context": 2e-7, "prefill_pairs": 1e-9,
    "sample": 5e-5,
}  # fmt: skip
MODEL = Fitted(TRUE, name="truth", digest="0", num_layers=16)
GRID = Grid(batches=(1, 2, 5, 16, 40), contexts=(16, 100, 300), chunks=(32, 100), rounds=2)


class Measured(ModelledExecutor):
    num_blocks, block_size = 4096, 16


def test_measured_steps_are_those_of_the_executor_and_their_fit_its_constants() -> None:
    async def main() -> list:  # type: ignore[type-arg]
        caps = Caps(num_layers=16, max_context=4096)
        return await measure_steps(Measured(MODEL, caps=caps), 500, GRID)

    steps = run(main())
    assert len(steps) > 100
    for features, seconds in steps:
        assert seconds == pytest.approx(MODEL.seconds(features), rel=1e-9)
    assert {one.features.num_decodes for one in steps} >= {0, 1, 2, 5, 16, 40}
    assert any(one.features.num_decodes and one.features.num_prefills for one in steps)
    fit = fit_steps([one.features for one in steps], [one.seconds for one in steps])
    assert fit.left_out < 1e-6


def test_a_grid_keeps_to_the_context_and_memory_it_is_given() -> None:
    small = list(GRID.fitting(max_context=128, max_positions=1000))
    assert {context for _, context, _ in small} == {16, 100}
    assert all((batch + 1) * context <= 1000 for batch, context, _ in small)
    assert not list(GRID.fitting(max_context=8, max_positions=1000))


def test_a_step_that_fails_ends_the_measurement() -> None:
    class Failing(Measured):
        def listen(self, on_completion: Callable[[Completion], None]) -> None:
            def fail(done: Completion) -> None:
                assert isinstance(done, Done)
                outputs = (Sampled(0, 0, error="out of tea"),)
                on_completion(Done(done.plan, 1, outputs, done.ends))

            super().listen(fail)

    async def main() -> None:
        await measure_steps(Failing(MODEL, caps=Caps(num_layers=16, max_context=4096)), 500, GRID)

    with pytest.raises(StepFailed, match="out of tea"):
        run(main())


def log_of_a_run(tmp_path: Path, trace: str, *sets: str) -> Path:
    """A simulation whose step times come from a profile with the TRUE constants."""
    profile = tmp_path / "truth.json"
    Profile(model="llama", num_layers=32, steps=TRUE, num_steps=1, mape=0, left_out=0).save(profile)
    values = (
        f"fleet.0.executor.profile={profile}",
        "fleet.0.model=llama-3.1-8b",
        "fleet.0.executor.kind=modelled",
        *sets,
    )
    log = tmp_path / "run.jsonl"
    config = load_config(sets=values)
    simulate(
        config, open_trace(DATA / trace, limit=80, speed=3, model="llama-3.1-8b"), log_path=log
    )
    return log


@pytest.mark.parametrize(
    ("trace", "num_blocks"),
    [("azure_2023_conv_200.csv", 4000), ("azure_2023_conv_200.csv", 500), ("mooncake_conversation_100.jsonl", 30_000)],
)  # fmt: skip
def test_a_log_gives_back_the_steps_that_were_run(
    tmp_path: Path, trace: str, num_blocks: int
) -> None:
    """With chunked prefills, preemptions and cached prefixes, none of whose starts the log states."""
    log = log_of_a_run(tmp_path, trace, f"fleet.0.cache.num_blocks={num_blocks}")
    (steps,) = steps_of_log(LogReader(log)).values()
    assert len(steps) > 500
    for features, seconds in steps:
        assert seconds == pytest.approx(MODEL.seconds(features), rel=1e-6)


def test_of_two_lanes_only_steps_that_ran_alone_count(tmp_path: Path) -> None:
    """Beside each other, or with a part of the device, steps take longer than any profile says."""
    log = log_of_a_run(
        tmp_path,
        "azure_2023_conv_200.csv",
        "fleet.0.cache.num_blocks=4000",
        "fleet.0.policy.preset=semi-pd",
        'fleet.0.executor.gpu="a100-80g"',
    )
    events = list(LogReader(log))
    assert {one.lane for one in events if isinstance(one, Stepped)} == {0, 1}
    (steps,) = steps_of_log(events).values()
    ran = sum(one.steps_run for one in events if isinstance(one, Completed))
    assert 100 < len(steps) < ran
    for features, seconds in steps:
        assert seconds == pytest.approx(MODEL.seconds(features), rel=1e-6)


def test_presets_with_two_lanes_are_not_calibrated() -> None:
    with pytest.raises(BadConfig, match="two steps side by side"):
        calibrate(Engine(), policy="semi-pd")


@pytest.mark.parametrize("what", ["the profile", "the table"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BadConfig, match=f"cannot write {what}"):
        calibrate(Engine(model="nowhere")) if what == "the profile" else time_schedulers()


def test_refitting_a_log_writes_a_profile_that_predicts_it(tmp_path: Path) -> None:
    log = log_of_a_run(tmp_path, "azure_2023_conv_200.csv", "fleet.0.cache.num_blocks=4000")
    out = tmp_path / "profile.json"
    found = refit(log, Engine(model="llama-3.1-8b"), out=out)
    assert found.fit.left_out < 1e-4 and "mean error" in str(found)
    assert load_profile(out) == found.profile and found.profile.num_layers == 32
    model = found.profile.step_model()
    for features, seconds in steps_of_log(LogReader(log))["llama-3.1-8b-0"][:200]:
        assert model.seconds(features) == pytest.approx(seconds, rel=1e-3)


def test_a_log_with_too_few_steps_says_so(tmp_path: Path) -> None:
    config = load_config(Path(__file__).parents[2] / "examples" / "azure_a100.toml")
    log = tmp_path / "run.jsonl"
    trace = open_trace(DATA / "azure_2023_conv_200.csv", limit=1, model="nobody")
    simulate(config, trace, log_path=log)
    with pytest.raises(BadTrace, match="measurable steps"):
        refit(log, Engine(model="llama-3.1-8b"), out=tmp_path / "x.json")


async def test_scheduling_is_timed_with_the_policies_at_hand() -> None:
    found = await schedule_cost({"preset": "sglang"})
    assert found.policies == "fcfs/full-fit/sglang/retract"
    assert found.seconds(0, 0) >= 0 and 0 < found.seconds(32, 10) < found.seconds(64, 1000)


def test_completions_of_several_runs_count_each(tmp_path: Path) -> None:
    """A launch that repeats is as many measured steps."""
    log = log_of_a_run(tmp_path, "azure_2023_conv_200.csv", "fleet.0.cache.num_blocks=4000")
    (steps,) = steps_of_log(LogReader(log)).values()
    events = LogReader(log)
    assert len(steps) == sum(one.steps_run for one in events if one.kind == "completed")


@pytest.mark.slow
def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "here.json"
    args = [
        "bench",
        "calibrate",
        "--quick",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--json",
    ]
    assert penstock(args) == 0
    told = json.loads(capsys.readouterr().out)
    profile = load_profile(out)
    assert told["schema"] == SCHEMA
    assert told["digest"] == profile.digest and profile.scheduler is not None
    assert profile.machine["device"].startswith("cpu") and profile.steps["token"] >= 0
