"""What guessing saves: decode on one stream with n-gram guesses and without, in turns, by CPU seconds.

    python benchmarks/speculation.py [MODEL] [--rounds 3] [--tokens 160]

Texts that repeat themselves (a function to be written again with one name changed, a paragraph to be quoted) and one
that does not. The model is the embedded one unless told otherwise; a random model needs no tokenizer and is given its
texts as numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from penstock.cluster.predictors import predictors_of_model
from penstock.cluster.spec import ExecutorSpec
from penstock.core.drafts import Speculation
from penstock.core.events import Drafted
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.turn import ReplicaPolicies
from penstock.policy.admit.full_fit import FullFit
from penstock.policy.batch.speculative import Speculative
from penstock.policy.batch.vllm_v1 import VllmV1
from penstock.policy.evict.lru import Lru
from penstock.policy.evict.recompute_last import RecomputeLast
from penstock.policy.order.fcfs import Fcfs
from penstock.report.log import Memory

CODE = """def total_price(items, tax_rate):
    total = 0.0
    for item in items:
        total = total + item.price * item.count
    return total * (1.0 + tax_rate)

def mean_price(items):
    total = 0.0
    for item in items:
        total = total + item.price * item.count
    return total / len(items)

# The same once more, with `entries` for `items`:
def total_price(entries, tax_rate):
    total = 0.0
"""
QUOTES = """The river rises in the hills above the town and turns the wheel of the old mill.
The wheel has turned since the town was built, and the mill grinds the grain of the valley.
In the words of the text: "The river rises in the hills above the town and turns the wheel"
And again, in the words of the text: "The wheel has turned since the town was built"
And again, in the words of the text: "The river rises"""
PLAIN = "Once there was a small engine that"


async def decode(
    model: str, executor: TorchExecutor, drafts: int | None, request: Request
) -> tuple[float, int, int, int]:
    """(CPU seconds, steps, guesses, right ones) of one answer."""
    batching: VllmV1 | Speculative = VllmV1()
    if drafts is not None:
        batching = Speculative(max_drafts=drafts)
    log = Memory()
    replica = Replica(
        ReplicaConfig(
            num_blocks=executor.num_blocks, block_size=executor.block_size, has_prefix_cache=False
        ),
        executor,
        ReplicaPolicies(
            order=Fcfs(), admit=FullFit(), batch=batching, evict=RecomputeLast(), blocks=Lru()
        ),
        predictors_of_model(ExecutorSpec(), model),
        log=log,
    )
    running = asyncio.get_running_loop().create_task(replica.run())
    began = time.process_time()
    replica.submit(request)
    await replica.drain()
    spent = time.process_time() - began
    running.cancel()
    told = [one for event in log.events if isinstance(event, Drafted) for one in event.guesses]
    steps = sum(event.kind == "completed" for event in log.events)
    return spent, steps, sum(one[1] for one in told), sum(one[2] for one in told)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160)
    asked = parser.parse_args()
    executor = open_executor(
        asked.model,
        EngineConfig(threads=1, memory_bytes=1 << 28, speculation=Speculation(max_drafts=7)),
    )
    path = Path(executor.facts.folder) / "tokenizer.json"
    texts = {"code edit": CODE, "quotes": QUOTES, "plain": PLAIN}
    if path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
        ids = {name: tokenizer.encode(text).ids for name, text in texts.items()}
    else:
        rng = random.Random(1)
        row = [rng.randrange(executor.facts.vocab_size) for _ in range(40)]
        ids = {"repeated": row * 4, "plain": row}
    print(
        f"{asked.model}: {asked.tokens} tokens on one stream, one thread, medians of {asked.rounds}"
    )
    print("| text | temperature | guesses, most | right | tokens a step | speed of plain |")
    print("|---|---|---|---|---|---|")
    for name, prompt in ids.items():
        for heat in (0.0, 0.7):
            request = Request(
                id=RequestId("r"),
                model="m",
                prompt=TokenPrompt(prompt),
                sampling=Sampling(
                    temperature=heat, seed=1, max_tokens=asked.tokens, ignore_eos=True
                ),
            )
            found: dict[int | None, list[tuple[float, int, int, int]]] = {}
            for turn in range(asked.rounds):
                for drafts in (None, 3, 7):
                    once = replace(request, id=RequestId(f"{turn} {drafts}"))
                    found.setdefault(drafts, []).append(
                        await decode(asked.model, executor, drafts, once)
                    )
            plain = sorted(one[0] for one in found[None])[asked.rounds // 2]
            for drafts in (3, 7):
                spent, steps, guesses, right = sorted(found[drafts])[asked.rounds // 2]
                share = f"{right / guesses:.0%}" if guesses else "-"
                print(
                    f"| {name} | {heat} | {drafts} | {right} of {guesses} ({share}) "
                    f"| {asked.tokens / steps:.2f} | {plain / spent:.2f} |"
                )
    await executor.stop()


if __name__ == "__main__":
    asyncio.run(main())
