"""Answers that follow a grammar, from the real engine: kept whatever the batch, the blocks and the chance."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer

from penstock.core.types import Grammar, Sampling
from penstock.engine.folder import DEFAULT_FOLDER
from penstock.engine.torch.open import EngineConfig
from tests.engine.torch.served import Setting, serve

if not (DEFAULT_FOLDER / "model.safetensors").exists():
    pytest.skip("the default model is not there", allow_module_level=True)

REGEX = r"[a-z]{6,9}\(\d{1,3}\)"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 6, "maxLength": 12},
        "size": {"type": "integer"},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
OBJECT = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
PROMPTS = ["x = ", '{"name": "box", "size": 3}\n', "def area(width, height):\n    return "]


def sampled(temperature: float) -> list[Sampling]:
    grammars = [None, OBJECT, Grammar(kind="regex", text=REGEX)]
    return [
        Sampling(
            max_tokens=36 if grammar is None else 24,
            temperature=temperature,
            seed=7,
            grammar=grammar,
            ignore_eos=grammar is None,
        )
        for grammar in grammars
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_the_grammar_is_kept_and_neither_batch_nor_preemption_matter(
    temperature: float,
) -> None:
    tokenizer = Tokenizer.from_file(str(DEFAULT_FOLDER / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    engine = EngineConfig(dtype="fp32", threads=1, num_blocks=5, block_size=8)
    asked = sampled(temperature)
    alone = await serve(
        DEFAULT_FOLDER, prompts, Setting(is_alone=True), sampling=asked, engine=engine
    )
    together = await serve(
        DEFAULT_FOLDER, prompts, Setting(budget=12), sampling=asked, engine=engine
    )
    assert together.num_preemptions > 0
    answers = []
    for number in range(len(prompts)):
        assert together.ids(number) == alone.ids(number)
        answers.append(str(tokenizer.decode(alone.ids(number))))
    assert re.fullmatch(REGEX, answers[2])
    told = json.loads(answers[1])
    assert isinstance(told["size"], int) and len(told["name"]) <= 12


async def test_an_unsound_grammar_ends_its_own_request_only() -> None:
    asked = [
        Sampling(max_tokens=4, grammar=Grammar(kind="regex", text="(a")),
        Sampling(max_tokens=4, temperature=0.0),
    ]
    told = await serve(
        DEFAULT_FOLDER, [[5, 6], [5, 6]], Setting(), sampling=asked, engine=EngineConfig(threads=1)
    )
    assert told.outputs[0][-1].finish == "error" and "unclosed" in (told.outputs[0][-1].error or "")
    assert len(told.ids(1)) == 4
