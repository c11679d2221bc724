# ruff: noqa: E402
"""The training text: found, split and turned into tokens the same way every time."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from penstock.learn.local.corpus import HELD_OUT_ONE_IN, Corpus, bucket, gather
from penstock.learn.local.dialogue import conversations
from penstock.learn.local.rivals import NGram, ngram_bits_per_byte, xz_bits_per_byte
from penstock.learn.local.stream import Windows
from penstock.learn.local.tokenizer import SPECIAL, encode_plain, train_tokenizer

SOURCE = '''"""Things to do with files."""

def {name}(path):
    """Return the size of the file at path in bytes."""
    return os.stat(path).st_size
'''


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    for index in range(150):
        (tmp_path / f"module{index}.py").write_text(SOURCE.format(name=f"size{index}"))
    for folder in ("test", "site-packages", "__pycache__"):
        (tmp_path / folder).mkdir()
        for index in range(80):
            (tmp_path / folder / f"t{index}.py").write_text(f"assert {index} or '{folder}'\n")
    (tmp_path / "copy.py").write_text(SOURCE.format(name="size3"))
    (tmp_path / "latin.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "table.py").write_text("# generated with gencodec.py\n")
    return tmp_path


def test_the_split_depends_on_names_alone(installation: Path) -> None:
    corpus = gather(installation)
    assert corpus == gather(installation)
    names = {document.name for document in corpus.held_out}
    assert names and names == {
        f"module{i}.py" for i in range(150) if bucket(f"module{i}.py", HELD_OUT_ONE_IN) == 0
    }
    assert not names & {document.name for document in corpus.train}


def test_what_teaches_nothing_is_left_out(installation: Path) -> None:
    corpus = gather(installation)
    names = [document.name for document in (*corpus.train, *corpus.held_out)]
    assert "latin.py" not in names and "table.py" not in names
    assert ("copy.py" in names) + ("module3.py" in names) == 1
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    tests = [document for document in corpus.train if document.kind == "tests"]
    assert 0 < len(tests) < 20
    assert all(document.kind != "tests" for document in corpus.held_out)


def test_conversations_come_from_docstrings_and_keep_to_their_share(installation: Path) -> None:
    documents = gather(installation).train
    chat = conversations(documents, share=0.2, seed=1)
    assert chat == conversations(documents, share=0.2, seed=1)
    assert 0 < sum(d.size for d in chat) < 0.2 * sum(d.size for d in documents) + 2000
    assert all(d.text.startswith("<|user|>") and d.text.endswith("<|end|>") for d in chat)
    text = "".join(d.text for d in conversations(documents, share=5.0, seed=1))
    assert "<|assistant|>Return the size of the file at path in bytes.<|end|>" in text


def test_tokens_give_the_text_back(installation: Path) -> None:
    corpus = gather(installation)
    tokenizer = train_tokenizer([d.text for d in corpus.train], 400)
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3]
    hard = "def f(x):\n\t  if x:\n        return 'é☃ \x00' \n\n\n<|end|>"
    (ids,) = encode_plain(tokenizer, [hard])
    assert min(ids) > 3
    assert tokenizer.decode(ids, skip_special_tokens=False) == hard
    assert tokenizer.encode("a<|end|>").ids[-1] == 3


def test_a_prompt_cut_after_the_indentation_is_a_prefix_of_what_was_learned(
    installation: Path,
) -> None:
    tokenizer = train_tokenizer([d.text for d in gather(installation).train], 400)
    whole = tokenizer.encode("def f(x):\n    return x\n").ids
    for cut in ("def f(x):", "def f(x):\n", "def f(x):\n    "):
        ids = tokenizer.encode(cut).ids
        assert whole[: len(ids)] == ids


def test_windows_cover_an_epoch_once_and_are_reproducible() -> None:
    import numpy as np

    ids = np.arange(1000, dtype=np.uint16)
    windows = Windows(ids, 16, seed=3)
    rows = windows.rows(0, windows.per_epoch)
    assert rows.shape == (windows.per_epoch, 17)
    assert len(set(rows[:, 0].tolist())) == windows.per_epoch
    again = Windows(ids, 16, seed=3)
    assert again.rows(7, 5).tolist() == rows[7:12].tolist()
    assert windows.rows(windows.per_epoch, 4).tolist() != rows[:4].tolist()
    with pytest.raises(ValueError, match="too few"):
        Windows(ids[:20], 16, seed=3)


def test_the_ngram_model_is_a_distribution() -> None:
    model = NGram([b"abracadabra", b"abra cadabra, said the magician"] * 3, order=3)
    for context in (b"", b"ab", b"zz"):
        total = sum(
            2.0 ** -(model.bits(context + bytes([b])) - model.bits(context)) for b in range(256)
        )
        assert total == pytest.approx(1.0, abs=1e-6)


def test_rivals_learn_from_what_they_are_given() -> None:
    learned = b"the quick brown fox jumps over the lazy dog. " * 40
    kept = b"the lazy dog jumps over the quick brown fox. " * 2
    alone, after = xz_bits_per_byte(learned, kept)
    assert after < alone
    assert ngram_bits_per_byte([learned], [kept]) < 1.0
    assert ngram_bits_per_byte([b"0123456789" * 50], [kept]) > 7.0


def test_the_running_python_has_a_corpus() -> None:
    corpus = gather()
    assert isinstance(corpus, Corpus)
    kinds = {document.kind for document in corpus.train}
    assert "code" in kinds
    assert sum(document.size for document in corpus.train) > 1_000_000
