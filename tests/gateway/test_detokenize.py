"""Incremental text equals decoding everything at once, for vocabularies of both kinds."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from penstock.engine.folder import DEFAULT_FOLDER
from penstock.gateway.detokenize import WindowDetokenizer
from penstock.gateway.text import TextModel

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40) | st.text(
    "aé 🐢żא\n<|end|>中", max_size=60
)


@pytest.fixture(scope="module")
def shipped() -> TextModel:
    """The tokenizer of the model that ships with the package."""
    return TextModel.load(DEFAULT_FOLDER)


def sentencepiece_like(strip: bool) -> Tokenizer:
    """Llama 2's layout: spaces as ▁, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    spell: list[object] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if strip:
        spell.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(spell)  # type: ignore[arg-type]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    words = ["hello world the quick brown fox jumps  over a lazy dog"]
    tokenizer.train_from_iterator(words, trainer)
    table = json.loads(tokenizer.to_str())
    table["added_tokens"] = table["added_tokens"][:3]  # bytes are plain tokens, shown like others
    return Tokenizer.from_str(json.dumps(table))


@pytest.fixture(scope="module", params=[True, False], ids=["strips", "keeps"])
def pieces(request: pytest.FixtureRequest) -> TextModel:
    return TextModel(sentencepiece_like(request.param), context_tokens=1000)


def told(model: TextModel, ids: Sequence[int], size: int, before: Sequence[int] = ()) -> str:
    """Text of `ids`, pushed `size` at a time."""
    reader = model.detokenizer(before)
    parts = [reader.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    return "".join(parts) + reader.flush()


@given(st.data(), st.integers(1, 5))
@settings(max_examples=120, deadline=None)
def test_random_ids_of_the_shipped_vocabulary(
    shipped: TextModel, data: st.DataObject, size: int
) -> None:
    ids = data.draw(st.lists(st.integers(0, shipped.num_vocabulary + 3), max_size=40))
    assert told(shipped, ids, size) == shipped.decode(ids)


@given(TEXTS, st.integers(1, 5))
@settings(max_examples=120, deadline=None)
def test_random_text_in_the_shipped_vocabulary(shipped: TextModel, text: str, size: int) -> None:
    ids = shipped.encode(text)
    assert told(shipped, ids, size) == shipped.decode(ids)


@given(TEXTS)
@settings(max_examples=120, deadline=None)
def test_no_piece_ends_inside_a_character(shipped: TextModel, text: str) -> None:
    reader = shipped.detokenizer()
    for id in shipped.encode(text):
        piece = reader.push((id,))
        assert "�" not in piece or "�" in text


@given(TEXTS, st.integers(1, 5))
@settings(max_examples=120, deadline=None)
def test_random_text_in_sentencepiece(pieces: TextModel, text: str, size: int) -> None:
    ids = pieces.encode(text)
    assert told(pieces, ids, size) == pieces.decode(ids)


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_random_ids_in_sentencepiece(pieces: TextModel, data: st.DataObject) -> None:
    """Without byte tokens: an invalid run of those is judged as a whole, and what was told stays told."""
    whole = [0, 1, 2, *range(259, pieces.num_vocabulary)]
    ids = data.draw(st.lists(st.sampled_from(whole), max_size=40))
    assert told(pieces, ids, 1) == pieces.decode(ids)


@given(TEXTS, st.integers(0, 20))
@settings(max_examples=120, deadline=None)
def test_an_answer_continues_its_prompt(pieces: TextModel, text: str, cut: int) -> None:
    """The space that begins a sentencepiece word is shown when the answer follows a prompt."""
    ids = pieces.encode("hello " + text)
    cut = min(len(ids), cut + 6)
    before = pieces.decode(ids[:cut])
    if "�" not in before and pieces.decode(ids).startswith(before):
        assert before + told(pieces, ids[cut:], 1, ids[:cut]) == pieces.decode(ids)


def test_a_window_does_not_hold_for_ever() -> None:
    reader = WindowDetokenizer(lambda ids: "�" * len(ids))
    spoken = [reader.push((0,)) for _ in range(100)]
    assert len("".join(spoken)) >= 80
    assert len("".join(spoken) + reader.flush()) == 100


def test_bytes_of_tokens_spell_the_text(shipped: TextModel, pieces: TextModel) -> None:
    text = "hello żółw 🐢"
    for model in (shipped, pieces):
        spelt = b"".join(model.token_bytes(id) for id in model.encode(text)).decode()
        assert spelt.strip() == text


def test_special_tokens_are_not_shown(text: TextModel) -> None:
    ids = text.encode("<|user|>Hello<|end|>")
    assert told(text, ids, 1) == text.decode(ids) == "Hello"


def test_added_tokens_may_hold_any_character() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=260, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["abc"], trainer)
    tokenizer.add_tokens(["<a tag>", "żółw🐢"])
    model = TextModel(tokenizer, context_tokens=100)
    ids = model.encode("abc<a tag>żółw🐢 x")
    assert told(model, ids, 1) == model.decode(ids)
