# ruff: noqa: E402
"""The training loop: it learns, a killed run goes on as if nothing had happened, and what it exports opens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

import penstock
from penstock.core.errors import BadConfig
from penstock.learn.local import TINY, train_default
from penstock.learn.local.corpus import Corpus, Document
from penstock.learn.local.decoder import Decoder
from penstock.learn.local.export import LARGEST_WEIGHTS, load
from penstock.learn.local.optimise import orthogonal
from penstock.learn.local.pretrain import read_log
from penstock.learn.local.score import asked, bits_per_byte, complete

FUNCTION = '''def {name}(self, value):
    """Set the {name} of this thing to value."""
    if value is None:
        raise ValueError("{name} must not be None")
    self._{name} = value
    return self

'''
WORDS = (
    "colour",
    "width",
    "height",
    "title",
    "parent",
    "state",
    "index",
    "owner",
    "limit",
    "source",
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    def document(index: int) -> Document:
        text = "".join(FUNCTION.format(name=word + str(index % 7)) for word in WORDS[index % 3 :])
        return Document(f"m{index}.py", text, "code")

    return Corpus(tuple(document(i) for i in range(40)), (document(40), document(41)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def losses(runs: Path) -> list[float]:
    return [line["loss"] for line in read_log(runs)]


def test_a_killed_run_resumes_as_if_uninterrupted(tmp_path: Path, corpus: Corpus) -> None:
    def train(runs: str, **more: object) -> None:
        train_default(
            tmp_path / "out",
            runs=tmp_path / runs,
            recipe=TINY,
            corpus=corpus,
            card=False,
            threads=2,
            **more,
        )

    train("whole")
    train("cut", stop_after=7)
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 8, "loss": 99.0}) + "\n")
    train("cut", stop_after=13)
    train("cut")
    assert len(losses(tmp_path / "whole")) == TINY.steps
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.3


def test_other_text_or_shape_is_refused_in_the_folder_of_a_run(
    tmp_path: Path, corpus: Corpus
) -> None:
    def train(recipe: object, text: Corpus) -> None:
        train_default(
            tmp_path / "out", runs=tmp_path, recipe=recipe, corpus=text, card=False, stop_after=1
        )

    train(TINY, corpus)
    with pytest.raises(BadConfig, match="another corpus"):
        train(TINY, Corpus(corpus.train[1:], corpus.held_out))
    with pytest.raises(BadConfig, match="another shape"):
        train(replace(TINY, shape=replace(TINY.shape, intermediate_size=96)), corpus)


def test_a_schedule_by_the_clock_ends(tmp_path: Path, corpus: Corpus) -> None:
    recipe = replace(TINY, steps=None)
    train_default(
        tmp_path / "out",
        runs=tmp_path,
        minutes=0.01,
        recipe=recipe,
        corpus=corpus,
        card=False,
        threads=1,
    )
    last = read_log(tmp_path)[-1]
    assert last["seconds"] >= 0.6
    assert "held_out" in last


def test_what_is_exported_opens_again_and_writes(tmp_path: Path, corpus: Corpus) -> None:
    folder = train_default(
        tmp_path / "out", runs=tmp_path / "runs", recipe=TINY, corpus=corpus, card=False
    )
    assert (folder / "model.safetensors").stat().st_size <= LARGEST_WEIGHTS
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["Qwen3ForCausalLM"]
    model, tokenizer = load(folder)
    bits = bits_per_byte(model, tokenizer, list(corpus.held_out))
    assert bits == pytest.approx(
        bits_per_byte(model, tokenizer, list(corpus.held_out), context=64), rel=0.1
    )
    assert 0.5 < bits < 8.0
    first = complete(model, tokenizer, asked("What is it?"), tokens=5, temperature=0.7, seed=3)
    assert first == complete(
        model, tokenizer, asked("What is it?"), tokens=5, temperature=0.7, seed=3
    )


def test_transformers_sees_the_same_model(tmp_path: Path, corpus: Corpus) -> None:
    transformers = pytest.importorskip("transformers")
    folder = train_default(
        tmp_path / "out", runs=tmp_path / "runs", recipe=TINY, corpus=corpus, card=False
    )
    ours, _ = load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(4, 44)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-4, rtol=1e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "What is it?"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == asked(
        "What is it?"
    )
    assert tokenizer.eos_token == "<|end|>"


def test_a_decoder_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = Decoder(TINY.shape)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    ids = torch.randint(0, TINY.shape.vocab_size, (1, 24))
    changed = ids.clone()
    changed[0, 15:] = 7
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


def test_the_loss_made_for_training_is_the_mean_loss() -> None:
    torch.manual_seed(0)
    model = Decoder(TINY.shape)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    ids = torch.randint(0, TINY.shape.vocab_size, (3, 17))
    weights = list(model.parameters())
    fast = model.mean_loss(ids[:, :-1], ids[:, 1:])
    plain = model.token_losses(ids[:, :-1], ids[:, 1:]).mean()
    torch.testing.assert_close(fast, plain)
    for mine, theirs in zip(
        torch.autograd.grad(0.5 * fast, weights),
        torch.autograd.grad(0.5 * plain, weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_muon_directions_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for rows, columns in ((16, 48), (48, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(3, rows, columns)))
        assert 0.5 < values.min() and values.max() < 1.35


def test_the_model_that_ships_has_learned_python() -> None:
    folder = Path(penstock.__file__).parent / "engine" / "default_model"
    assert (folder / "model.safetensors").stat().st_size <= LARGEST_WEIGHTS
    assert (folder / "README.md").exists() and (folder / "loss.png").exists()
    model, tokenizer = load(folder)
    text = "import os\nimport sys\n\n\ndef main(self, *args, **kwargs):\n    if not args:\n        return None\n"
    assert bits_per_byte(model, tokenizer, [Document("main.py", text, "code")]) < 1.5
    answer = complete(
        model, tokenizer, asked("What does str.upper do?"), tokens=60, temperature=0.0
    )
    assert 0 < len(answer) < 200
