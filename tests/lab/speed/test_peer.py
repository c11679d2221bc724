"""Processes that speak in lines: what is heard of them, and what becomes of those that cannot or die."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from penstock.lab.speed.asks import Ask, Sizes, answered, many_of, prefixed
from penstock.lab.speed.peer import Mark, Peer, PeerFailed, PeerSpec

SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted.py")))


def peer_of(folder: Path, *arguments: str) -> Peer:
    return Peer(PeerSpec(name="it", command=(*SCRIPTED, *arguments)), folder / "said.txt")


def test_a_peer_is_named_and_commanded() -> None:
    spec = PeerSpec.parse("a b=env X=1 run --model 'my model'")
    assert (spec.name, spec.command) == ("a b", ("env", "X=1", "run", "--model", "my model"))
    for wrong in ("nothing", "=run", "name= "):
        with pytest.raises(ValueError, match="NAME=COMMAND"):
            PeerSpec.parse(wrong)


async def test_marks_come_with_instants_and_the_processor_time_used_by_then(tmp_path: Path) -> None:
    peer = peer_of(tmp_path, "0.01")
    await peer.start()
    assert peer.weights == ("bf16",) and peer.about == "scripted 1"
    await peer.load({"model": "x"})
    assert peer.about == "scripted 1, loaded"
    span = await answered(peer, Ask(prompts=((1,) * 200,), tokens=(17,), every=8))
    assert [mark.tokens for mark in span.marks] == [1, 8, 16, 17]
    first, last = span.first(0), span.marks[-1]
    # 20 and 16 hundredths of a second of its own processor; the system counts in hundredths.
    assert first.cpu_s - span.asked.cpu_s == pytest.approx(0.20, abs=0.035)
    assert last.cpu_s - first.cpu_s == pytest.approx(0.16, abs=0.035)
    assert last.at - span.asked.at >= 0.35
    await peer.quit()


async def test_what_it_cannot_do_is_told_and_the_next_question_may_come(tmp_path: Path) -> None:
    peer = peer_of(tmp_path, "0", "bf16", "many")
    await peer.start()
    with pytest.raises(PeerFailed, match="one at a time"):
        await answered(peer, Ask(prompts=((1,), (2,)), tokens=(1, 1)))
    marks: list[Mark] = []
    await peer.ask(Ask(prompts=((1,),), tokens=(1,)).question(), marks.append)
    assert len(marks) == 1
    await peer.quit()


async def test_one_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    peer = peer_of(tmp_path, "0", "bf16", "live")
    await peer.start()
    with pytest.raises(PeerFailed, match="it ended: out of memory"):
        await answered(peer, Ask(prompts=((1,),), tokens=(1,)))
    await peer.quit()
    missing = Peer(PeerSpec(name="it", command=("/no/such/program",)), tmp_path / "said.txt")
    with pytest.raises(PeerFailed, match="No such file"):
        await missing.start()
    await missing.quit()


def test_requests_are_the_same_for_all_and_other_ones_each_time() -> None:
    sizes = Sizes(requests=8, prefix=64, tail=8)
    assert many_of(sizes, 1) == many_of(sizes, 1) != many_of(sizes, 2)
    for prompt, count in zip(many_of(sizes, 1).prompts, many_of(sizes, 1).tokens, strict=True):
        assert 64 <= len(prompt) <= 512 and 64 <= count <= 128
    shared, own = prefixed(sizes, 1, is_shared=True), prefixed(sizes, 1, is_shared=False)
    assert len({prompt[:64] for prompt in shared.prompts}) == 1
    assert len({prompt[64:] for prompt in shared.prompts}) == 8
    assert len({prompt[:16] for prompt in own.prompts}) == 8
