"""The account of a run is the same whoever keeps it: this process, or a second one that is forked on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from penstock.core.errors import PenstockError
from penstock.core.events import Header
from penstock.report import account as module
from penstock.report.account import Account, Accounted
from penstock.report.log import MANY, Digest, read_log
from penstock.report.metrics import Metrics
from tests.report.test_metrics import arrived, completed, finished

needs_fork = pytest.mark.skipif(not module.can_fork(), reason="needs Linux and two processors")


def fill(account: Account, num: int) -> None:
    account.emit(Header(version="0", who="simulation"))
    for number in range(num):
        name, tenant = f"r{number}", f"t{number % 3}"
        at = number / 7
        account.emit(arrived(name, at, number, tenant=tenant))
        account.emit(completed(at + 0.3, number, (at + 0.1, at + 0.3), [(number, 2)]))
        account.emit(finished(name, at + 0.1, at + 0.3, arrived_at=at, num_output=2, tenant=tenant))


def accounted(num: int, path: Path | None = None, *, may_fork: bool) -> Accounted:
    account = Account(log_path=path, may_fork=may_fork)
    fill(account, num)
    return account.close()


@needs_fork
@pytest.mark.parametrize("num", [10, 2 * MANY, 3000])
def test_a_second_process_tells_the_same(
    num: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FORK_AFTER", 2 * MANY)
    here = accounted(num, tmp_path / "here.jsonl", may_fork=False)
    apart = accounted(num, tmp_path / "apart.jsonl", may_fork=True)
    assert here == apart and here.num_events == 3 * num + 1
    assert (tmp_path / "here.jsonl").read_bytes() == (tmp_path / "apart.jsonl").read_bytes()


def test_the_account_is_that_of_the_log(tmp_path: Path) -> None:
    told = accounted(500, tmp_path / "log.jsonl", may_fork=False)
    digest, metrics = Digest(), Metrics()
    for event in read_log(tmp_path / "log.jsonl"):
        digest.emit(event)
        metrics.emit(event)
    assert told.digest == digest.hexdigest() and told.num_events == digest.num_events == 1501
    assert told.figures == metrics.figures() and told.figures.all.num_finished == 500


@needs_fork
def test_a_lost_second_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORK_AFTER", MANY)
    account = Account(may_fork=True)
    fill(account, MANY)
    assert account._child is not None
    os.kill(account._child._pid, signal.SIGKILL)
    with pytest.raises(PenstockError, match="has ended"):
        for _ in range(100):
            account._hand_over()
        account.close()


def test_an_abandoned_run_keeps_its_log(tmp_path: Path) -> None:
    account = Account(log_path=tmp_path / "log.jsonl")
    fill(account, 5)
    account.abandon()
    assert len(list(read_log(tmp_path / "log.jsonl"))) == 16
