"""A whole run with engines that are scripts: who takes part, in which order, what is told of those that cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.__main__ import run as penstock
from penstock.lab.speed import reading, turns
from penstock.lab.speed.asks import Sizes
from penstock.lab.speed.figures import digest
from penstock.lab.speed.peer import PeerSpec
from penstock.lab.speed.text import BEGIN, END, page_of, text_of
from penstock.lab.speed.turns import Turns, Wanted
from tests.lab.speed.test_peer import SCRIPTED

SIZES = Sizes(
    context=20, steps=16, prefills=(24,), requests=3, prompt=(4, 8), answer=(2, 4), prefix=8
)


def spec(name: str, *arguments: str) -> PeerSpec:
    return PeerSpec(name=name, command=(*SCRIPTED, *arguments))


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = spec("penstock", "0.005", "bf16")
    monkeypatch.setattr(turns, "engines", lambda wanted: [ours, *wanted.peers])
    monkeypatch.setattr(reading, "SIZE_BYTES", 1 << 20)
    monkeypatch.setattr(reading.Reader.__init__, "__defaults__", (1 << 20,))


async def test_engines_take_turns_and_the_rest_is_told(tmp_path: Path) -> None:
    peers = (
        spec("slow", "0.01", "bf16"),
        spec("single", "0.005", "bf16", "many"),
        spec("eight", "0", "int8"),
        PeerSpec(name="gone", command=("/no/such/program",)),
    )
    wanted = Wanted(
        model="default",
        peers=peers,
        repeats=2,
        sizes=SIZES,
        scratch=tmp_path,
    )
    heard: list[tuple[int, int]] = []
    found = await Turns(wanted, lambda done, of, told: heard.append((done, of))).all()
    order = [(one.engine, one.repeat) for one in found.samples if one.measure == "decode"]
    assert order == [
        ("penstock", 0), ("slow", 0), ("single", 0), ("slow", 1), ("single", 1), ("penstock", 1),
    ]  # fmt: skip
    measured = {(one.engine, one.measure) for one in found.samples}
    assert {name for name, measure in measured if measure == "many"} == {"penstock", "slow"}
    assert ("single", "start") in measured and ("slow", "prefix warm") in measured
    why = {(each.engine, each.weights, each.measure): each.why for each in found.absent}
    assert why["single", "bf16", "many"] == "one at a time"
    assert why["eight", "bf16", "decode"] == "no weights of bf16: it has int8"
    assert why["gone", "bf16", "start"] == "/no/such/program: No such file or directory"
    assert len(found.reads) == (2 + 1 + 1) * 2
    assert heard[-1][0] < heard[-1][1]  # some were left out

    told = digest([json.loads(json.dumps(found.to_dict()))])
    by = {(each.peer, each.measure): each for each in told.ratios}
    assert 1.4 < by["slow", "decode"].value < 3.0  # twice the work, in ticks of a hundredth
    assert "not run: gone" in text_of(told) and "of the roof" in text_of(told)
    assert "| decode, one stream | bf16 | 1 |" in page_of([told])


def test_the_verb_shows_kept_runs_and_writes_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, page = tmp_path / "kept.json", tmp_path / "page.md"
    page.write_text(f"# Speed\n{BEGIN}\n{END}\n")
    flags = ["--model", "default", "--only", "decode,start", "--repeats", "1", "--context", "8"]
    assert penstock(
        ["bench", "engine", *flags, "--steps", "16", "--scratch", str(tmp_path), "--out", str(kept)]
    ) == 0  # fmt: skip
    assert "decode, one stream" in capsys.readouterr().out
    assert penstock(["bench", "engine", "--from", str(kept), "--page", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["measure"] for one in told["samples"]} == {"prefill 8", "decode", "start"}
    assert "start to first token" in page.read_text()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--peer", "x"], "NAME=COMMAND"),
        (["--weights", "int2"], "there is no 'int2'"),
        (["--only", "speed"], "there is no 'speed'"),
        (["--threads", "0"], "numbers are needed"),
        (["--prefills", "1"], "at least 2 tokens"),
        (["--model", "/no/such"], "there is no model folder"),
        (["--from", "/no/such.json"], "cannot read"),
    ],
)
def test_what_cannot_be_measured_is_told(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert penstock(["bench", "engine", *flags]) == 2
    assert told in capsys.readouterr().err
