"""A GGUF file's vocabulary as the files that a tokenizer has on a hub. Imports no torch.

    gpt2     byte-level BPE: the file lists the merges; `tokenizer.ggml.pre` names how text is cut before
    llama    SentencePiece's BPE: no merges, a score for each token. Two tokens merge where the vocabulary has the
             result, the best score first (of Gemma, whose scores say nothing, the first in the vocabulary first);
             characters that it lacks are spelled in bytes

All tokens keep their place. Those of kind "control" are special; those of kind "user-defined" are matched whole as
well, but are part of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.core.errors import BadModel
from penstock.engine.torch.checkpoints.gguf.format import Metadata
from penstock.engine.torch.checkpoints.hints import AGAIN

Table = dict[str, object]
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of tokens
SPACE = "\u2581"
CONTRACTED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2 = CONTRACTED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SLASHED = TAIL.replace(r"[\r\n]*", r"[\r\n/]*")
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
TEKKEN = CASED.replace("%s", "") + r"|\p{N}" + SLASHED
GPT4O = CASED.replace("%s", CONTRACTED + "?") + r"|\p{N}{1,3}" + SLASHED
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
DEEPSEEK = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)
CUTS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (GPT2,),
    "default": (GPT2,),
    "llama-bpe": (LLAMA3,),
    "llama3": (LLAMA3,),
    "llama-v3": (LLAMA3,),
    "falcon3": (LLAMA3,),
    "pixtral": (LLAMA3,),
    "dbrx": (LLAMA3,),
    "smaug-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "deepseek-r1-qwen": (QWEN2,),
    "megrez": (QWEN2,),
    "stablelm2": (QWEN2,),
    "smollm": (r"\p{N}", GPT2),
    "starcoder": (r"\p{N}", GPT2),
    "command-r": (r"\p{N}", GPT2),
    "refact": (r"\p{N}", GPT2),
    "tekken": (TEKKEN,),
    "gpt-4o": (GPT4O,),
    "deepseek-llm": (*DEEPSEEK, r"\p{N}+"),
    "deepseek-coder": (*DEEPSEEK, r"\p{N}"),
    "deepseek-v3": DEEPSEEK_V3,
}
WHOLE_FIRST = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "tekken",
)  # a word that is a token is not built by merges
COMPOSED = ("qwen2", "deepseek-r1-qwen")  # text is brought to Unicode's composed form
ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<EOT>",
)  # which end an answer, wherever they are control tokens


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a file. `model` and `cut`: as the file calls them."""

    model: str
    cut: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str] | None
    told: Metadata
    is_gemma: bool

    def token_id(self, name: str) -> int | None:
        """Of a token with a role: bos, eos ..."""
        found = self.told.get(f"tokenizer.ggml.{name}_token_id")
        return found if isinstance(found, int) and found < len(self.tokens) else None

    def flag(self, name: str, default: bool) -> bool:
        found = self.told.get(f"tokenizer.ggml.{name}")
        return default if found is None else bool(found)


def read_vocabulary(told: Metadata, where: Path) -> Vocabulary:
    """Raises BadModel."""
    model, tokens = str(told.get("tokenizer.ggml.model")), told.get("tokenizer.ggml.tokens")
    if model not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise BadModel(
            f"{where}: a tokenizer of kind {model!r} cannot be read",
            hint="read are gpt2 (byte-level BPE) and llama (SentencePiece)",
        )
    cut = str(told.get("tokenizer.ggml.pre") or "default")
    if model == "gpt2" and cut not in CUTS:
        raise BadModel(
            f"{where}: it is not known how {cut!r} cuts text into words",
            hint=f"known are {', '.join(CUTS)}",
        )
    merges = told.get("tokenizer.ggml.merges")
    return Vocabulary(
        model=model,
        cut=cut,
        tokens=[str(token) for token in tokens],
        kinds=_list(told, "token_type", 1, len(tokens), where),
        scores=_list(told, "scores", 0.0, len(tokens), where),
        merges=_merges(merges, where) if isinstance(merges, list) else None,
        told=told,
        is_gemma=str(told.get("general.architecture")).startswith("gemma"),
    )


def _merges(told: list[object], where: Path) -> list[str]:
    found = [str(merge) for merge in told]
    broken = next((merge for merge in found if " " not in merge[1:]), None)
    if broken is not None:
        raise BadModel(f"{where}: {broken!r} in merges is no pair of tokens", hint=AGAIN)
    return found


def _list(told: Metadata, name: str, default: float, count: int, where: Path) -> list[int]:
    found = told.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list):
        return [default] * count  # type: ignore[list-item]
    if len(found) != count:
        raise BadModel(f"{where}: {count} tokens, but {len(found)} entries in {name}")
    return found


def tokenizer_json(words: Vocabulary) -> Table:
    """What `tokenizers` reads."""
    model, rest = _byte_level(words) if words.model == "gpt2" else _sentence_piece(words)
    added = [
        {
            "id": at,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for at, (token, kind) in enumerate(zip(words.tokens, words.kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED) and token
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **rest,
        "post_processor": _around(words),
        "model": {"type": "BPE", "dropout": None, **model},
    }


def _byte_level(words: Vocabulary) -> tuple[Table, Table]:
    vocab = {token: at for at, token in reversed(list(enumerate(words.tokens)))}
    cuts: list[Table] = [
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
        for one in CUTS[words.cut]
    ]
    spelled = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: Table = {
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": words.cut in WHOLE_FIRST,
        "vocab": vocab,
        "merges": [_pair(merge) for merge in words.merges or ()],
    }
    rest: Table = {
        "normalizer": {"type": "NFC"} if words.cut in COMPOSED else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*cuts, {"type": "ByteLevel", **spelled}],
        },
        "decoder": {"type": "ByteLevel", **spelled},
    }
    return model, rest


def _pair(merge: str) -> list[str]:
    """The two sides lie around the first space that has something before it."""
    at = merge.index(" ", 1)
    return [merge[:at], merge[at + 1 :]]


def _sentence_piece(words: Vocabulary) -> tuple[Table, Table]:
    tokens = words.tokens
    if words.is_gemma:  # which stores runs of spaces as they are
        tokens = [
            token.replace(" ", SPACE) if token.isspace() and " " in token else token
            for token in tokens
        ]
    vocab = {token: at for at, token in reversed(list(enumerate(tokens)))}
    ranks = [-at for at in range(len(tokens))] if words.is_gemma else words.scores
    unknown = words.token_id("unknown")
    if unknown is None:
        unknown = next((at for at, kind in enumerate(words.kinds) if kind == UNKNOWN), None)
    has_prefix = words.flag("add_space_prefix", default=not words.is_gemma)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    model: Table = {
        "unk_token": None if unknown is None else tokens[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges_of(tokens, vocab, ranks, words.kinds),
    }
    rest: Table = {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
    }
    return model, rest


def merges_of(
    tokens: Sequence[str], vocab: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[list[str]]:
    """All pairs of tokens whose sum is one, the best result first; of one result, the first left side first."""
    found = []
    for at, token in enumerate(tokens):
        if kinds[at] in (UNKNOWN, CONTROL) or len(token) < 2:
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[at], at, left, token[:cut], token[cut:]))
    found.sort()
    return [[left, right] for *_, left, right in found]


def _around(words: Vocabulary) -> Table | None:
    """The tokens put before and behind every text."""
    is_bpe = words.model == "gpt2"
    bos, eos = words.token_id("bos"), words.token_id("eos")
    before = words.flag("add_bos_token", not is_bpe or words.cut in WHOLE_FIRST)
    behind = words.flag("add_eos_token", False)
    first = [] if bos is None or not before else [bos]
    last = [] if eos is None or not behind else [eos]
    if not first and not last:
        return None

    def special(at: int) -> Table:
        return {"SpecialToken": {"id": words.tokens[at], "type_id": 0}}

    single = [*map(special, first), {"Sequence": {"id": "A", "type_id": 0}}, *map(special, last)]
    pair = [
        *single,
        *map(special, first),
        {"Sequence": {"id": "B", "type_id": 1}},
        *map(special, last),
    ]
    named = {
        words.tokens[at]: {"id": words.tokens[at], "ids": [at], "tokens": [words.tokens[at]]}
        for at in (*first, *last)
    }
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


def settings_json(words: Vocabulary) -> Table:
    """tokenizer_config.json."""
    found: Table = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        at = words.token_id(name)
        if at is not None:
            found[f"{role}_token"] = words.tokens[at]
    template = words.told.get("tokenizer.chat_template")
    if isinstance(template, str):
        found["chat_template"] = template
    return found


def end_ids(words: Vocabulary) -> list[int]:
    """Every token that ends an answer."""
    ids = [words.token_id(role) for role in ("eos", "eot", "eom")]
    for at, (token, kind) in enumerate(zip(words.tokens, words.kinds, strict=True)):
        if kind == CONTROL and token in ENDS:
            ids.append(at)
    return list(dict.fromkeys(at for at in ids if at is not None))
