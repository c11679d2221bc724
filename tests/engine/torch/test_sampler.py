"""The sampler against plain definitions over whole vocabularies, and against the frequencies they predict."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock.core.plans import Opening
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.engine.torch.chance import chance_of, uniform
from penstock.engine.torch.jobs import JobState, JobTable
from penstock.engine.torch.sampler import draw, draw_shaped

VOCAB = 600


def tables(
    *chosen: Sampling, prompt: tuple[int, ...] = (5, 6), outputs: tuple[int, ...] = ()
) -> tuple[JobTable, list[JobState]]:
    table = JobTable(vocab_size=VOCAB, block_size=16, num_layers=2, eos_ids=(2,))
    for seq, sampling in enumerate(chosen):
        request = Request(
            id=RequestId(str(seq)), model="m", prompt=TokenPrompt(prompt), sampling=sampling
        )
        assert table.open(Opening(seq, request, 0), seed=seq) is None
        for token in outputs:
            table.append(table.jobs[seq], token)
    return table, [table.jobs[seq] for seq in range(len(chosen))]


def logits_of(seed: int = 0, rows: int = 1, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def expected(logits: torch.Tensor, chosen: Sampling) -> torch.Tensor:
    """The distribution by the book: sort everything, cut, renormalise after each cut."""
    logits = logits / chosen.temperature
    if chosen.min_p:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < chosen.min_p * probs.max(), -torch.inf)
    if chosen.top_k:
        least = logits.topk(min(chosen.top_k, VOCAB)).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(0) - probs[order]
    probs[order[before >= chosen.top_p]] = 0
    return probs / probs.sum()


LIMITS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_p=0.8),
    Sampling(top_k=7),
    Sampling(min_p=0.05),
    Sampling(top_p=0.95, temperature=3.0),  # reaches far beyond the first candidates
    Sampling(top_k=40, top_p=0.9, min_p=0.02, temperature=1.3),
    Sampling(top_k=VOCAB + 5, min_p=0.01, top_p=0.5),
]


@pytest.mark.parametrize("chosen", LIMITS)
def test_frequencies(chosen: Sampling) -> None:
    """20,000 draws: nothing outside the allowed set, and a chi-square of the frequencies that fits."""
    logits, draws = logits_of(), 20_000
    table, jobs = tables(chosen)
    counts = torch.zeros(VOCAB)
    for first in range(0, draws, 1000):
        many = [jobs[0]] * 1000
        ids = draw_at(table, many, logits.expand(1000, -1).clone(), first)
        counts += torch.bincount(torch.tensor(ids), minlength=VOCAB)
    want = expected(logits[0], chosen)
    assert counts[want == 0].sum() == 0
    likely = want * draws >= 5
    chi = ((counts - want * draws) ** 2 / (want * draws))[likely].sum()
    freedom = int(likely.sum()) - 1
    assert chi < freedom + 4 * (2 * freedom) ** 0.5 + 4


def draw_at(table: JobTable, jobs: list[JobState], logits: torch.Tensor, first: int) -> list[int]:
    """Draws as if the rows were successive positions of one job."""
    positions = range(first, first + len(jobs))
    return draw_shaped(logits, [job.wishes for job in jobs], positions)[0]


def test_neighbours_do_not_matter() -> None:
    """A row's token is the same alone and in a batch of every kind of row."""
    kinds = [*LIMITS, Sampling(temperature=0.0), Sampling(presence_penalty=1.0, seed=4)]
    logits = logits_of(rows=len(kinds))
    table, jobs = tables(*kinds, outputs=(9, 9, 10))
    together = draw(logits.clone(), table, jobs).ids
    alone = [draw(logits[at : at + 1].clone(), table, [job]).ids[0] for at, job in enumerate(jobs)]
    assert together == alone


def test_seeds() -> None:
    """Same seed, answer and position: same token. Any of them different: independent draws."""
    logits = torch.zeros(1, VOCAB)
    table, jobs = tables(Sampling(seed=11), Sampling(seed=11), Sampling(seed=12))
    first, again, other = (draw(logits.clone(), table, [job]).ids[0] for job in jobs)
    assert first == again != other
    table.append(jobs[0], 3)
    assert draw(logits.clone(), table, [jobs[0]]).ids[0] != first


def test_uniforms_are_uniform() -> None:
    count = range(20_000)
    for found in (
        [uniform(chance_of(seed, 0), 0) for seed in count],
        [uniform(chance_of(0, answer), 0) for answer in count],
        [uniform(chance_of(0, 0), position) for position in count],
    ):
        drawn = np.sort(found)
        gap = np.abs(drawn - (np.arange(20_000) + 0.5) / 20_000).max()
        assert gap < 1.95 / 20_000**0.5  # Kolmogorov-Smirnov, one in a thousand


def test_penalties() -> None:
    """Repetition counts prompt and output, presence and frequency the output only."""
    chosen = Sampling(
        temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, [5, 9, 20]] = torch.tensor([8.0, 9.0, 3.9])
    table, jobs = tables(chosen, prompt=(5, 6), outputs=(9, 9))
    # 5: 8 / 2 = 4.0; 9: 9 / 2 - 0.5 - 2 * 0.25 = 3.5; 20: untouched
    assert draw(logits.clone(), table, jobs).ids == [5]
    logits[0, 20] = 4.1
    assert draw(logits.clone(), table, jobs).ids == [20]
    logits[0, [5, 20]] = torch.tensor([-50.0, 3.4])
    assert draw(logits.clone(), table, jobs).ids == [9]
    logits[0, 20] = 3.6
    assert draw(logits.clone(), table, jobs).ids == [20]


def test_bias_and_minimum_length() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = 50.0
    chosen = Sampling(
        temperature=0.0, min_tokens=2, stop_ids=(7,), logit_bias=((7, 90.0), (8, 3.0))
    )
    table, jobs = tables(chosen)
    assert draw(logits.clone(), table, jobs).ids == [8]  # 2 ends the text and 7 stops it: banned
    table.append(jobs[0], 8)
    table.append(jobs[0], 8)
    assert draw(logits.clone(), table, jobs).ids == [7]


def test_logprobs_are_the_models() -> None:
    """Whatever was penalised or heated, log-probabilities are of the raw model."""
    logits = logits_of(3)
    chosen = Sampling(temperature=0.0, logit_bias=((77, 100.0),), logprobs=3)
    table, jobs = tables(chosen)
    drawn = draw(logits.clone(), table, jobs)
    want = logits[0].log_softmax(-1)
    entry = drawn.logprobs[0]
    assert entry is not None and entry.id == 77
    assert entry.logprob == pytest.approx(float(want[77]), abs=1e-5)
    best = want.topk(3)
    assert [token for token, _ in entry.top] == best.indices.tolist()
    assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("chosen", [Sampling(), Sampling(top_p=0.9), Sampling(temperature=0.0)])
def test_broken_logits_are_told(broken: float, chosen: Sampling) -> None:
    """One row without finite numbers spoils no other, however it is drawn."""
    logits = logits_of(rows=2)
    logits[1, :] = broken
    table, jobs = tables(Sampling(), chosen)
    drawn = draw(logits, table, jobs)
    assert drawn.is_broken == [False, True]
    assert all(0 <= token < logits.shape[1] for token in drawn.ids)


def test_with_and_without_kernels_the_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a kernel go through torch's topk; for equal seeds they end at the same tokens."""
    logits = logits_of().expand(300, -1)
    for chosen in LIMITS:
        table, jobs = tables(chosen)
        with monkeypatch.context() as patch:
            patch.setattr("penstock.engine.torch.sampler.can_limit", lambda _: False)
            want = draw_at(table, [jobs[0]] * 300, logits.clone(), 0)
        assert draw_at(table, [jobs[0]] * 300, logits.clone(), 0) == want
