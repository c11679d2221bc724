"""Guesses change no text: not the greedy one, not a drawn one, whatever is asked for, however often they are right."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tokenizers import Tokenizer

from penstock.core.drafts import Speculation
from penstock.core.errors import BadConfig
from penstock.core.plans import Opening, Work
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Grammar, Request, RequestId, Sampling
from penstock.engine.folder import DEFAULT_FOLDER
from penstock.engine.torch.drafts.ngram import Ngrams
from penstock.engine.torch.drafts.verify import sampling_rows, verified
from penstock.engine.torch.jobs import JobState, JobTable
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.torch.sampler import draw
from tests.engine.torch.models import FAMILIES, saved
from tests.engine.torch.served import Served, Setting, serve
from tests.engine.torch.test_against_transformers import ENGINE, NUM_TOKENS, compare, prompts

VOCAB = 512
QUICK = ("qwen3", "gemma3")
REST = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in QUICK]
needs_default = pytest.mark.skipif(
    not (DEFAULT_FOLDER / "model.safetensors").exists(), reason="the default model is not there"
)


def slow(*case: object) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


class Knowing:
    """Knows the answers, and lies now and then: guesses of every length, right up to anywhere."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], seed: int = 0) -> None:
        self.texts, self.chance = texts, random.Random(seed)

    def propose(
        self, table: JobTable, jobs: Sequence[JobState], most: Sequence[int]
    ) -> list[list[int]]:
        found = []
        for job, count in zip(jobs, most, strict=True):
            done = len(table.outputs(job))
            text = self.texts[tuple(job.prompt.ids)][done : done + self.chance.randint(0, count)]
            lies = [self.chance.randrange(VOCAB) for _ in text]
            pairs = zip(text, lies, strict=True)
            found.append([one if self.chance.random() < 0.8 else lie for one, lie in pairs])
        return found

    def close(self, seq: int) -> None:
        pass


# ------------------------------------------------------------------ n-grams


def guess_slowly(ids: list[int], shortest: int, longest: int, most: int) -> list[int]:
    for length in range(longest, shortest - 1, -1):
        places = [at for at in range(length, len(ids)) if ids[at - length : at] == ids[-length:]]
        if length < len(ids) and places:
            grown = list(ids)
            for at in range(most):
                grown.append(grown[places[-1] + at])
            return grown[len(ids) :]
    return []


def table_of(ids: Sequence[int], vocab: int = VOCAB) -> tuple[JobTable, JobState]:
    table = JobTable(vocab_size=vocab, block_size=16, num_layers=1, eos_ids=())
    request = Request(id=RequestId("r"), model="m", prompt=TokenPrompt(list(ids)))
    assert table.open(Opening(0, request, 0), 1) is None
    return table, table.jobs[0]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.integers(1, 150),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=40),
    st.integers(0, 1 << 30),
)
def test_the_latest_place_of_the_longest_run(
    size: int, steps: list[tuple[int, int]], seed: int
) -> None:
    """Against looking at every place, while the text grows and, after aborted plans, shrinks."""
    rng = random.Random(seed)
    table, job = table_of([rng.randrange(3) for _ in range(size)])
    ngrams = Ngrams(2, 4)
    for grow, most in steps:
        ids = table.tokens[job.row, : job.known].tolist()
        assert ngrams.propose(table, [job], [most])[0] == guess_slowly(ids, 2, 4, most)
        for _ in range(grow):
            table.append(job, rng.randrange(3))


def test_a_text_that_lost_its_end_is_guessed_all_the_same() -> None:
    table, job = table_of([1, 2, 3, 1, 2])
    ngrams = Ngrams(2, 4)
    for token in (3, 1, 2):
        table.append(job, token)
    assert ngrams.propose(table, [job], [3]) == [[3, 1, 2]]
    job.known = 5
    assert ngrams.propose(table, [job], [4]) == [[3, 1, 2, 3]]
    ngrams.close(0)
    ngrams.close(0)


# ------------------------------------------------------------------ greedy texts


async def known(root: Path, name: str) -> tuple[Served, dict[tuple[int, ...], list[int]]]:
    plain = await greedy(root, name, Setting())
    return plain, {ids: plain.ids(at) for at, ids in enumerate(prompts())}


async def greedy(root: Path, name: str, setting: Setting, engine: EngineConfig = ENGINE) -> Served:
    asked = [Sampling(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True) for _ in prompts()]
    return await serve(saved(root, name)[0], prompts(), setting, sampling=asked, engine=engine)


@pytest.mark.parametrize("name", [*QUICK, *REST])
async def test_greedy_texts_are_the_references(model_root: Path, name: str) -> None:
    """In batches, with chunks of prompts beside, from a prefix cache, after preemptions; guessed by who knows."""
    plain, texts = await known(model_root, name)
    assert plain.guesses == (0, 0)
    tight = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=26)
    for setting, engine in (
        (Setting(drafts=5, drafter=Knowing(texts), budget=20), ENGINE),
        (Setting(drafts=3, drafter=Knowing(texts, 1), num_blocks=26, store="radix"), tight),
    ):
        found = await greedy(model_root, name, setting, engine)
        compare(model_root, name, found)
        drafted, right = found.guesses
        assert drafted > 200 and right > 0.5 * drafted
        assert found.num_preemptions or engine is ENGINE


async def test_own_ngrams_leave_greedy_texts_alone(model_root: Path) -> None:
    engine = EngineConfig(device="cpu", dtype="fp32", threads=1, speculation=Speculation())
    found = await greedy(model_root, "qwen3", Setting(drafts=4), engine)
    compare(model_root, "qwen3", found)
    assert found.guesses[0] > 0


async def test_room_that_nobody_fills_is_a_plain_step(model_root: Path) -> None:
    """A policy plans guesses and the engine makes none."""
    found = await greedy(model_root, "llama3", Setting(drafts=4))
    compare(model_root, "llama3", found)
    assert found.guesses == (0, 0)


# ------------------------------------------------------------------ a model that guesses


@pytest.mark.parametrize(
    ("name", "draft", "least"), [("qwen3", "qwen3", 0.9), slow("llama3", "qwen3", 0.0)]
)
async def test_a_model_guesses(model_root: Path, name: str, draft: str, least: float) -> None:
    """One that is the served model guesses right; one that knows nothing of it does no harm. Preempted, in chunks."""
    told = Speculation(method="draft", model=str(saved(model_root, draft)[0]))
    tight = replace(ENGINE, num_blocks=26, speculation=told)
    found = await greedy(model_root, name, Setting(drafts=3, budget=40), tight)
    compare(model_root, name, found)
    drafted, right = found.guesses
    assert drafted > 200 and right >= least * drafted and found.num_preemptions


async def test_models_that_agree_draw_alike(model_root: Path) -> None:
    folder = saved(model_root, "qwen3")[0]
    asked = [
        Sampling(
            temperature=0.9, seed=at, max_tokens=40, ignore_eos=True, top_p=0.95 if at % 2 else 1
        )
        for at in range(len(prompts()))
    ]
    engine = replace(ENGINE, speculation=Speculation(method="draft", model=str(folder)))
    plain = await serve(folder, prompts(), Setting(), sampling=asked, engine=ENGINE)
    found = await serve(folder, prompts(), Setting(drafts=3), sampling=asked, engine=engine)
    same = [plain.ids(at) == found.ids(at) for at in range(len(asked))]
    assert same.count(False) <= 1  # see test_every_wish_is_kept
    drafted, right = found.guesses
    assert right > 0.9 * drafted > 100


async def test_memory_is_shared_with_the_model_that_guesses(model_root: Path) -> None:
    folder = saved(model_root, "qwen3")[0]
    told = Speculation(method="draft", model=str(folder))
    sizes = []
    for speculation in (None, told):
        engine = replace(ENGINE, memory_bytes=1 << 20, speculation=speculation)
        executor = open_executor(str(folder), engine)
        sizes.append(executor.num_blocks)
        await executor.stop()
    assert sizes[0] // 2 - 1 <= sizes[1] <= sizes[0] // 2


def test_models_that_cannot_guess_are_refused(model_root: Path, tmp_path: Path) -> None:
    folder = saved(model_root, "qwen3")[0]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    table = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(table | {"vocab_size": 300}))
    told = Speculation(method="draft", model=str(other))
    with pytest.raises(BadConfig, match="other tokens"):
        open_executor(str(folder), replace(ENGINE, speculation=told))
    with pytest.raises(BadConfig, match="several processes"):
        open_executor(str(folder), replace(ENGINE, tensor_parallel=2, speculation=told))


# ------------------------------------------------------------------ whatever is asked for

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
WISHES = [
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.8, seed=4, top_p=0.9, top_k=30),
    Sampling(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
    Sampling(temperature=0.7, seed=5, logit_bias=((260, 2.5), (300, -5.0)), logprobs=2),
    Sampling(temperature=0.0, logprobs=3, stop_ids=tuple(range(256, 400, 7)), min_tokens=9),
    Sampling(temperature=1.0, seed=6, grammar=Grammar(kind="json_schema", text=json.dumps(SCHEMA))),
    Sampling(temperature=0.0, grammar=Grammar(kind="regex", text=r"[a-z]{3,5}(, [a-z]{3,5}){3,9}")),
    Sampling(temperature=0.9, seed=8, min_p=0.05),
]
BEGINNINGS = [
    "def area(width, height):\n    return ", "x = x + 1\ny = y + 1\nz = ", "the cat and the dog and ",
    "[1, 2, 3, 1, 2, 3, 1, ", "for i in range(10):\n    print(i)\n", '{"name": "box"}\n', "a, b: ", "once ",
]  # fmt: skip


def told(served: Served, at: int) -> list[object]:
    outputs = served.outputs[at]
    entries = [(one.id, [i for i, _ in one.top]) for out in outputs for one in out.logprobs]
    return [served.ids(at), outputs[-1].finish, entries]


@needs_default
@pytest.mark.parametrize("knows", [True, slow(False)])
async def test_every_wish_is_kept(knows: bool) -> None:
    """Seeds, penalties, biases, stops, grammars and log-probabilities: the same tokens with guesses and without."""
    tokenizer = Tokenizer.from_file(str(DEFAULT_FOLDER / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in BEGINNINGS]
    asked = [replace(wish, max_tokens=70) for wish in WISHES]
    engine = EngineConfig(dtype="fp32", threads=1, num_blocks=30, block_size=8)
    plain = await serve(DEFAULT_FOLDER, ids, Setting(budget=32), sampling=asked, engine=engine)
    texts = {tuple(one): plain.ids(at) for at, one in enumerate(ids)}
    drafter = Knowing(texts, 3) if knows else Ngrams()
    setting = Setting(budget=32, drafts=6, drafter=drafter)
    guessed = await serve(DEFAULT_FOLDER, ids, setting, sampling=asked, engine=engine)
    same = [at for at in range(len(ids)) if told(guessed, at) == told(plain, at)]
    # A draw on the edge between two tokens may go to either (kernels.draw); hardly one in ten thousand does.
    assert len(same) >= len(ids) - 1
    pairs = [
        (one.logprob, other.logprob)
        for at in same
        for out, more in [(plain.outputs[at], guessed.outputs[at])]
        for one, other in zip(
            [entry for each in out for entry in each.logprobs],
            [entry for each in more for entry in each.logprobs],
            strict=True,
        )
    ]
    assert len(pairs) > 50
    assert np.allclose(*np.array(pairs).T, atol=1e-3)
    assert guessed.guesses[1] > (100 if knows else 3)


# ------------------------------------------------------------------ distributions


@pytest.mark.parametrize(
    ("kind", "top_k"),
    [("uniform", None), ("likely", None), ("wrong", None), slow("likely", 3), slow("fixed", 3)],
)
def test_drawn_texts_have_the_models_distribution(kind: str, top_k: int | None) -> None:
    """Three tokens of a model whose next-token law is known, guessed well or badly: chi-square over all texts."""
    vocab, length, runs = 4, 3, 1500
    law = np.random.default_rng(5).dirichlet(np.ones(vocab) * 0.8, (vocab + 1,) * length)
    rng = random.Random(7)
    counts: dict[tuple[int, ...], int] = {}

    def probabilities(before: Sequence[int]) -> np.ndarray:
        row = law[tuple(before) + (vocab,) * (length - len(before))].copy()
        if top_k is not None:
            row[np.argsort(row)[:-top_k]] = 0
        return row / row.sum()

    def guesses(before: Sequence[int]) -> list[int]:
        found: list[int] = []
        while len(before) + len(found) < length - 1:
            row = probabilities([*before, *found])
            likely = {"likely": int(row.argmax()), "fixed": 1, "wrong": int(row.argmin())}
            found.append(likely.get(kind, rng.randrange(vocab)))
        return found

    for run in range(runs):
        table = JobTable(vocab_size=vocab, block_size=16, num_layers=1, eos_ids=())
        wish = Sampling(temperature=1.0, top_k=top_k, seed=run, max_tokens=length)
        request = Request(id=RequestId("r"), model="m", prompt=TokenPrompt([0]), sampling=wish)
        assert table.open(Opening(0, request, 0), 0) is None
        job = table.jobs[0]
        while job.num_output < length:
            before = table.outputs(job).tolist()
            told = guesses(before)
            table.guess(job, told)
            work = Work(0, job.known - 1, 1 + len(told), True, phase="verify")
            rows = [probabilities([*before, *told[:at]]) for at in range(work.tokens)]
            logits = torch.from_numpy(np.log(np.maximum(rows, 1e-30))).float()
            drawn = draw(logits, table, *sampling_rows([work], [job]))
            verified(table, work, job, drawn, 0)
        text = tuple(table.outputs(job).tolist()[:length])
        counts[text] = counts.get(text, 0) + 1
    expected, observed = [], []
    for text in np.ndindex(*(vocab,) * length):
        chance = np.prod([probabilities(text[:at])[text[at]] for at in range(length)])
        expected.append(chance * runs)
        observed.append(counts.get(text, 0))
    likely = np.array(expected) >= 5
    pooled = [np.array(each)[~likely].sum() for each in (observed, expected)]
    seen, wanted = np.array(observed)[likely], np.array(expected)[likely]
    if pooled[1] >= 1:
        seen, wanted = np.append(seen, pooled[0]), np.append(wanted, pooled[1])
    assert seen.sum() == pytest.approx(runs, abs=5)
    assert chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3
