"""What a Hugging Face model folder says about text: end tokens, context, special tokens, chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from penstock.core.errors import BadModel
from penstock.engine.folder import model_facts, read_json
from penstock.gateway.template import ChatTemplate


def read_table(path: Path) -> dict[str, Any]:
    """A JSON object in a file; empty when there is no such file."""
    return read_json(path) if path.exists() else {}


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadModel(
            f"{path} is missing",
            hint="models that ship only tokenizer.model must be saved once with a fast tokenizer",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the Rust side raises Exception itself
        raise BadModel(f"{path} is not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token ... as text, from tokenizer_config.json and, behind it, special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_table(folder / name).items():
            if key.endswith("_token") and isinstance(value, str):
                found[key] = value
            elif key.endswith("_token") and isinstance(value, dict):
                found[key] = str(value.get("content", ""))
    return found


def eos_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, else the config's; and the tokenizer's own."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_table(folder / name).get("eos_token_id")
        if value is not None:
            ids.update(_ids(value, folder / name))
            break
    own = tokenizer.token_to_id(special_tokens(folder).get("eos_token", ""))
    return frozenset(ids if own is None else ids | {own})


def _ids(value: object, where: Path) -> list[int]:
    ids = [id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)]
    if not ids or (isinstance(value, list) and len(ids) < len(value)):
        raise BadModel(f"{where}: eos_token_id should be a token id or a list of them")
    return ids


@dataclass(frozen=True, slots=True)
class Preferred:
    """How a model's makers would have it sampled; None where they say nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def preferred(folder: Path) -> Preferred:
    """From generation_config.json, unless it says that the model is not to be sampled from."""
    table = read_table(folder / "generation_config.json")
    if not table.get("do_sample", True):
        return Preferred()
    told = {name: table[name] for name in Preferred.__slots__ if table.get(name) is not None}
    for name, value in told.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadModel(f"{folder / 'generation_config.json'}: {name} should be a number")
    return Preferred(**told)


def context_tokens(folder: Path) -> int:
    """Positions the model was made for."""
    config = read_table(folder / "config.json")
    nested = config.get("text_config")
    for table in (config, nested if isinstance(nested, dict) else {}):
        for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
            if isinstance(table.get(key), int):
                return int(table[key])
    if isinstance(
        nested, dict
    ):  # files about several models leave out what is usual in their family
        return model_facts(folder).max_context
    raise BadModel(f"{folder / 'config.json'} does not say max_position_embeddings")


def load_template(folder: Path) -> ChatTemplate | None:
    """chat_template.jinja, else the template named "default" in tokenizer_config.json; None without one."""
    names = special_tokens(folder)
    path = folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"), names, str(path))
    path = folder / "tokenizer_config.json"
    told = read_table(path).get("chat_template")
    if isinstance(told, list):
        named = {entry.get("name"): entry.get("template") for entry in told}
        told = named.get("default")
    return ChatTemplate(told, names, str(path)) if isinstance(told, str) else None
