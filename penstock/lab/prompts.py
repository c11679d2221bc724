"""Text of a wanted number of tokens: what a bench sends in place of prompts that no trace publishes.

Plain words are drawn from a seeded stream until their token counts sum to the traced length. Tokenizers cut text at
spaces before they look inside words, so a word counts the same wherever it stands; each count is asked for once,
of the server (/tokenize) or a tokenizer folder, else four characters are taken for a token.

Where the trace names shared blocks (Mooncake's hash ids), the text of a block is a function of its id alone, so
equal prefixes are equal text and the server's prefix cache meets what the trace recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.core.errors import BadModel
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Request
from penstock.lab.client import Client

CHARS_PER_TOKEN = 4
MAX_CACHED_BLOCKS = 4096
WORDS = tuple(
    """
    the of and to in is it you that he was for on are with as his they be at one have this from or had by word but
    what some we can out other were all there when up use your how said an each she which do their time if will way
    about many then them write would like so these her long make thing see him two has look more day could go come
    did number sound no most people my over know water than call first who may down side been now find any new work
    part take get place made live where after back little only round man year came show every good me give our under
    name very through just form sentence great think say help low line differ turn cause much mean before move right
    boy old too same tell does set three want air well also play small end put home read hand port large spell add
    even land here must big high such follow act why ask men change went light kind off need house picture try us
    again animal point mother world near build self earth father
    """.split()
)


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Words with their token counts. `source` says who counted; `is_exact` is False for an estimate."""

    words: tuple[str, ...]
    counts: tuple[int, ...]
    source: str
    is_exact: bool


async def lexicon_of(client: Client, folder: Path | None = None) -> Lexicon:
    """The best count at hand: a tokenizer folder, the server's own, or an estimate."""
    told = [f" {word}" for word in WORDS]
    if folder is not None:
        return Lexicon(WORDS, tuple(_folder_counts(folder, told)), f"tokenizer of {folder}", True)
    first = await client.count_tokens(told[0])
    if first is None:
        counts = tuple(max(1, round(len(word) / CHARS_PER_TOKEN)) for word in told)
        return Lexicon(WORDS, counts, f"an estimate ({CHARS_PER_TOKEN} characters a token)", False)
    return Lexicon(WORDS, tuple(await _server_counts(client, told)), "the server's /tokenize", True)


async def _server_counts(client: Client, told: Sequence[str]) -> list[int]:
    """Counts of words, by halves: a text with as many tokens as words needs no closer look."""
    total = await client.count_tokens("".join(told))
    if total is None or total == len(told):
        return [1] * len(told)
    if len(told) == 1:
        return [total]
    middle = len(told) // 2
    first, second = await asyncio.gather(
        _server_counts(client, told[:middle]), _server_counts(client, told[middle:])
    )
    return first + second


def _folder_counts(folder: Path, told: Sequence[str]) -> list[int]:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json" if folder.is_dir() else folder
    if not path.exists():
        raise BadModel(f"there is no tokenizer.json in {folder}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise BadModel(f"{path} is not a tokenizer: {error}") from None
    return [len(tokenizer.encode(word, add_special_tokens=False).ids) for word in told]


class Composer:
    """Writes prompts. The same seed, request and lexicon give the same text."""

    def __init__(self, lexicon: Lexicon, seed: int) -> None:
        self._lexicon, self._seed = lexicon, seed
        pairs = [pair for pair in zip(lexicon.words, lexicon.counts, strict=True) if pair[1] > 0]
        self._pairs = pairs
        self._short = [pair for pair in pairs if pair[1] == min(count for _, count in pairs)]
        self._blocks: dict[tuple[int, int], str] = {}

    def compose(self, request: Request) -> str:
        """Text of `request.prompt.num_tokens` tokens."""
        prompt = request.prompt
        if not isinstance(prompt, TracedPrompt) or not prompt.hash_ids:
            return self._text(("prompt", request.id), prompt.num_tokens)
        parts, left = [], prompt.num_tokens
        for block in prompt.hash_ids:
            tokens = min(left, prompt.traced_size)
            parts.append(self._block(block, tokens))
            left -= tokens
        if left:
            parts.append(self._text(("prompt", request.id), left))
        return "".join(parts)

    def _block(self, block: int, tokens: int) -> str:
        known = self._blocks.get((block, tokens))
        if known is None:
            if len(self._blocks) >= MAX_CACHED_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
            known = self._text(("block", str(block)), tokens)
            self._blocks[block, tokens] = known
        return known

    def _text(self, names: tuple[str, str], tokens: int) -> str:
        """Words until their counts sum to `tokens`, or as near as the shortest word allows. Begins with a space.

        `names` is the stream they are drawn from.
        """
        chance = stream(self._seed, *names)
        told: list[str] = []
        left = tokens
        longest = max(count for _, count in self._pairs)
        while left > longest:
            for word, count in chance.choices(self._pairs, k=max(1, left // longest)):
                told.append(word)
                left -= count
        while left > 0:
            fitting = [pair for pair in self._pairs if pair[1] <= left] or self._short
            word, count = chance.choice(fitting)
            told.append(word)
            left -= count
        return " " + " ".join(told)
