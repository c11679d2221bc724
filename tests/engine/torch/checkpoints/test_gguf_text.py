"""Vocabularies of GGUF files cut and join text as the tokenizers they were made from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from penstock.core.errors import BadModel
from penstock.engine.folder import local_folder
from penstock.engine.torch.checkpoints.gguf.format import read_header
from penstock.engine.torch.checkpoints.gguf.tokenizer import (
    CUTS,
    end_ids,
    read_vocabulary,
    settings_json,
    tokenizer_json,
)
from tests.engine.torch.checkpoints.gguf_files import spelled, vocabulary_file

# as the models' own tokenizer.json have them
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEXTS = [
    "Hello world",
    " it's 12345 o'clock, I'LL say\n\n\n  def f(x):\n\treturn x**2  ",
    "naïve cafe\u0301 中文字符 の ひらがな 🙂🙃 \u00a0 ﬁ",
    "<|im_start|>user\nHi<|im_end|>\n<think>no</think>",
    "",
    "   ",
    "a  b   c\r\n\r\nd",
]
CORPUS = [
    *TEXTS,
    "the quick brown fox jumps over the lazy dog " * 3,
    "0123456789 " * 5,
    "cafés naïves",
]


def byte_level(cut: str, *, composed: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    if composed:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    made.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
    )
    return made


def kinds_of(made: Tokenizer) -> list[int]:
    added = made.get_added_tokens_decoder()
    return [
        1 if at not in added else 3 if added[at].special else 4
        for at in range(made.get_vocab_size())
    ]


def rebuilt(path: Path) -> Tokenizer:
    words = read_vocabulary(read_header(path).metadata, path)
    return Tokenizer.from_str(json.dumps(tokenizer_json(words)))


def same(made: Tokenizer, ours: Tokenizer, texts: Iterable[str], **more: bool) -> None:
    for text in texts:
        want, got = made.encode(text, **more).ids, ours.encode(text, **more).ids
        assert got == want, text
        assert ours.decode(got) == made.decode(want)
        assert ours.decode(got, skip_special_tokens=False) == made.decode(
            want, skip_special_tokens=False
        )
    assert [ours.id_to_token(at) for at in range(made.get_vocab_size())] == spelled(made)


@pytest.mark.parametrize(("pre", "cut"), [("qwen2", QWEN), ("llama-bpe", LLAMA)])
def test_byte_level(tmp_path: Path, pre: str, cut: str) -> None:
    made = byte_level(cut, composed=pre == "qwen2")
    merges = json.loads(made.to_str())["model"]["merges"]
    end = made.token_to_id("<|im_end|>")
    told = {
        "model": "gpt2",
        "pre": pre,
        "eos_token_id": end,
        "add_bos_token": False,
        "template": "{{ messages }}",
    }
    path = tmp_path / "v.gguf"
    joined = [" ".join(one) for one in merges]
    vocabulary_file(path, spelled(made), kinds=kinds_of(made), merges=joined, told=told)
    same(made, rebuilt(path), TEXTS)
    words = read_vocabulary(read_header(path).metadata, path)
    assert settings_json(words) == {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    assert end_ids(words) == [end, made.token_to_id("<|endoftext|>")]


def sentence_piece(has_prefix: bool) -> tuple[Tokenizer, list[float]]:
    """With bytes for what is not in the vocabulary, and scores in the order in which merges were learned."""
    learned = Tokenizer(models.BPE())
    scheme = "always" if has_prefix else "never"
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    learned.train_from_iterator(
        CORPUS[-3:], trainers.BpeTrainer(vocab_size=150, show_progress=False)
    )
    model = json.loads(learned.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    single = [token for token in spelled(learned) if len(token) == 1]
    merged = list(dict.fromkeys("".join(pair) for pair in model["merges"]))
    tokens = [*pieces, *merged, *single]
    vocab = {token: at for at, token in enumerate(tokens)}
    scores = [-float(at) for at in range(len(tokens))]
    steps = [normalizers.Prepend("▁")] if has_prefix else []
    made = Tokenizer(
        models.BPE(
            vocab,
            [tuple(one) for one in model["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if has_prefix else [])])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made, scores


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentence_piece(tmp_path: Path, has_prefix: bool) -> None:
    made, scores = sentence_piece(has_prefix)
    kinds = [2, 3, 3, *[6] * 256, *[1] * (made.get_vocab_size() - 259)]
    told = {"model": "llama", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    told |= {"add_space_prefix": has_prefix}
    path = tmp_path / "v.gguf"
    vocabulary_file(path, spelled(made), kinds=kinds, scores=scores, told=told)
    ours = rebuilt(path)
    same(made, ours, [*TEXTS, "the lazy fox <s> jumps</s>"], add_special_tokens=False)
    assert ours.encode("the").ids[0] == 1  # a beginning is put before every text
    assert ours.encode("the").ids[1:] == made.encode("the").ids


@pytest.mark.parametrize("pre", sorted(CUTS))
def test_every_way_of_cutting_keeps_the_text(tmp_path: Path, pre: str) -> None:
    made = byte_level(QWEN, composed=False)
    merges = json.loads(made.to_str())["model"]["merges"]
    path = tmp_path / "v.gguf"
    vocabulary_file(
        path,
        spelled(made),
        kinds=kinds_of(made),
        merges=[" ".join(one) for one in merges],
        told={"model": "gpt2", "pre": pre, "architecture": "qwen2"},
    )
    ours = rebuilt(path)
    for text in TEXTS:
        if "cafe\u0301" not in text:  # which some bring into one letter
            assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    for told, text in (
        ({"model": "t5"}, "a tokenizer of kind 't5'"),
        ({"model": "gpt2", "pre": "kimi-k2"}, "how 'kimi-k2' cuts text"),
        ({"model": "gpt2", "pre": "qwen2"}, "'ab' in merges is no pair"),
    ):
        vocabulary_file(path, ["a", "b"], kinds=[1, 1], merges=["a b", "ab"], told=told)
        with pytest.raises(BadModel, match=text):
            local_folder(path)
