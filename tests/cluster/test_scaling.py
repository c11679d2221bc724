"""A fleet that grows and shrinks in virtual time: nothing is lost, the bounds hold, and a log replays its decisions."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.assemble import load_config
from penstock.core.errors import BadConfig
from penstock.core.events import Left, Scaled, Steered
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.replay import replay_log
from penstock.lab.simulate import Simulated, simulate
from penstock.report.log import LogReader
from penstock.traffic import TraceMeta

FLEET = """
is_checked = true
[[fleet]]
model = "default"
replicas = 1
size = {least = 1, most = 3}
executor = {kind = "modelled", gpu = "l4"}
cache = {num_blocks = 400}
policy = {route = "least", scale = {name = "per-replica", target = 4, every_s = 1}}
"""


class Burst:
    """Forty requests within two seconds, and one that comes when all is over."""

    meta = TraceMeta("burst", "made here")

    def __iter__(self):  # type: ignore[no-untyped-def]
        for number in range(41):
            at = 200.0 if number == 40 else number * 0.05
            yield (
                at,
                Request(
                    id=RequestId(f"r{number}"),
                    model="default",
                    prompt=TracedPrompt(64),
                    sampling=Sampling(max_tokens=2000, ignore_eos=True),
                    true_output=2000,
                ),
            )


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Simulated, Path]:
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "fleet.toml").write_text(FLEET)
    log = folder / "log.jsonl"
    return simulate(load_config(folder / "fleet.toml"), Burst(), log_path=log), log


def test_it_grows_to_its_bound_shrinks_to_its_bound_and_loses_nothing(
    played: tuple[Simulated, Path],
) -> None:
    outcome, log = played
    assert outcome.played.num_served == 41 and not outcome.played.errors
    events = list(LogReader(log))
    scaled = [event for event in events if isinstance(event, Scaled)]
    assert sum(count for event in scaled for _, count in event.add) == 2
    left = [event.replica for event in events if isinstance(event, Left)]
    assert len(left) == 2 and len(set(left)) == 2
    assert [name for event in scaled for name in event.drain] == left
    assert not any(isinstance(event, Steered) for event in events)


def test_its_decisions_are_replayed(played: tuple[Simulated, Path]) -> None:
    for outcome in replay_log(played[1]):
        assert outcome.difference is None


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ("size = {least = 2, most = 3}", "replicas must be from 2 to 3"),
        ("size = {least = 3, most = 2}", "least and most"),
        ("size = {least = 1, most = 3}", "bounds what"),
        ("moves = {slots = 2}", "bounds what"),
        ("roles = {prefil = 1}", "no role"),
        ("roles = {prefill = 2}", "in all"),
        ('policy = {scale = "none-such"}', "per-replica"),
    ],
)
def test_sizes_and_roles_that_cannot_be_are_refused(tmp_path: Path, field: str, match: str) -> None:
    (tmp_path / "fleet.toml").write_text(f"[[fleet]]\nreplicas = 1\n{field}\n")
    with pytest.raises(BadConfig, match=match):
        load_config(tmp_path / "fleet.toml")
