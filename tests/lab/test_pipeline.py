"""A template from the search to the simulated step: same deployment, same operator times, shorter steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from penstock.__main__ import run
from penstock.assemble import Config, load_config
from penstock.core.errors import BadConfig
from penstock.core.events import Event, Opened, Stepped
from penstock.cost.hardware import card_of, num_blocks
from penstock.cost.nano_layer import nano_ops
from penstock.cost.shapes import PRESETS
from penstock.lab import nano_search
from penstock.lab.nano_search import EFFORTS, Effort
from penstock.lab.pipeline import Planned, lengths_of, most_tokens, plan_pipeline
from penstock.lab.pipeline_picture import lanes, text_of
from penstock.lab.simulate import Simulated, simulate
from penstock.traffic import open_trace

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "nanoflow_70b.toml"
TRACE = ROOT / "data" / "azure_2023_conv_200.csv"
LITTLE = Effort(name="little", shapes=((1, 1),), nodes=200, polished=0, rounds=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def planned(folder: Path) -> Planned:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "quick", LITTLE)
        patch.setattr(nano_search, "STARTS", ())
        config = load_config(EXAMPLE)
        found = plan_pipeline(config, [(512, 512)], effort="quick", cache=folder / "cache")
    (folder / "p.json").write_text(found.template.to_json())
    return found


def deployment(*templates: Path, **more: str) -> Config:
    sets = [f"fleet.0.executor.templates={json.dumps([str(path) for path in templates])}"]
    sets += [f"{name.replace('__', '.')}={value}" for name, value in more.items()]
    return load_config(EXAMPLE, sets=sets)


class Heard:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def simulated(config: Config) -> tuple[Simulated, Heard]:
    heard = Heard()
    trace = open_trace(TRACE, rate_per_s=200.0, model="llama-2-70b")
    return simulate(config, trace, listeners=(heard,)), heard


def test_steps_of_the_deployment_are_run_under_its_template(planned: Planned, folder: Path) -> None:
    """All at once, so batches are full: the same steps, and less time by about the template's gain."""
    plain, heard = simulated(deployment())
    nano, others = simulated(deployment(folder / "p.json"))
    steps = [[e.chunks for e in each.events if isinstance(e, Stepped)] for each in (heard, others)]
    assert steps[0][:5] == steps[1][:5]
    gain = plain.figures.duration_s / nano.figures.duration_s
    assert 1.02 < gain < planned.template.gain * 1.05
    made = next(e.made for e in others.events if isinstance(e, Opened) and e.what == "replica")
    assert planned.template.name in made  # so that its log can be replayed


def test_a_template_of_another_deployment_is_refused(planned: Planned, folder: Path) -> None:
    path = folder / "p.json"
    with pytest.raises(BadConfig, match="searched for llama-2-70b on 8 a100-80g"):
        simulated(deployment(path, fleet__0__executor__gpu="h100"))
    with pytest.raises(BadConfig, match="is for 8 devices, not 4"):
        simulated(deployment(path, fleet__0__executor__tensor_parallel="4"))
    with pytest.raises(BadConfig, match="lanes share it"):
        simulated(deployment(path, fleet__0__executor__lanes="2"))
    with pytest.raises(BadConfig, match="asks for the template 'mine'; this executor has llama"):
        simulated(deployment(path, fleet__0__policy__batch__nano="mine"))
    with pytest.raises(BadConfig, match="this executor has none"):
        simulated(deployment(fleet__0__policy__batch__nano="mine"))


def test_the_batch_is_what_memory_keeps_full(planned: Planned) -> None:
    """By hand: 85 % of the blocks, by decodes half way through 512 tokens behind 512, and as many prompt tokens."""
    fleet, shape = load_config(EXAMPLE).fleet[0], PRESETS["llama-2-70b"]
    positions = 16 * num_blocks(card_of("a100-80g"), shape, tp=8)
    decodes = 0.85 * positions / (512 + 256 + 16)
    assert planned.most_tokens == int(2 * decodes) // 128 * 128
    assert planned.template.tokens == 2048 and planned.load.decodes == 1024
    assert (
        most_tokens(dataclasses.replace(fleet, executor=type(fleet.executor)()), shape, [(1, 1)])
        is None
    )
    with pytest.raises(BadConfig, match="at least 128 tokens"):
        plan_pipeline(load_config(EXAMPLE), [(512, 512)], tokens=64)


def test_lanes_show_each_operator_as_long_as_it_runs(planned: Planned) -> None:
    width = 400
    found = lanes(planned, width)
    ops = nano_ops(planned.template.split, 8)
    for resource, line in found.items():
        busy = sum(s.end - s.start for s in planned.spans if ops[s.number].resource == resource)
        shown = len(line) - line.count(".")
        assert len(line) == width
        assert shown / width == pytest.approx(busy / planned.template.period_s, abs=0.03)
    assert list(found) == ["compute", "memory", "network"]
    assert {letter for letter in found["compute"] if letter.isalpha()} >= set("QOGD")
    assert set(found["network"]) >= {"o", "d", "1", "2"}
    told = text_of(planned)
    assert planned.template.name in told and "modelled, nothing ran" in told


def test_lengths_come_from_a_trace() -> None:
    found = lengths_of(open_trace(TRACE))
    assert len(found) == 200 and found[0] == (374, 44)
    with pytest.raises(BadConfig, match="how long its answers are"):
        lengths_of([])


def test_the_verb_writes_a_template_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(EFFORTS, "quick", LITTLE)
    monkeypatch.setattr(nano_search, "STARTS", ())
    out, picture = tmp_path / "p.json", tmp_path / "p.png"
    args = ["plan", "pipeline", str(EXAMPLE), "--lengths", "512/512", "--quick", "--tokens", "1024"]
    assert run([*args, "--out", str(out), "--plot", str(picture)]) == 0
    assert "one period of" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run([*args, "--out", str(out), "--json"]) == 0  # from the cache
    told = json.loads(capsys.readouterr().out)
    assert told["template"] == json.loads(out.read_text())
    assert told["gain"] > 1 and told["template"]["tokens"] == 1024
    for wrong in (["--trace", str(TRACE)], ["--lengths", "512"]):
        assert run([*args, *wrong, "--out", str(out)]) == 2
        assert "penstock: " in capsys.readouterr().err
