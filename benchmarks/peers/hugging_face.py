"""transformers for `penstock bench engine`: `generate` for one request, its continuous batching for several.

    --peer "transformers=VENV/bin/python benchmarks/peers/hugging_face.py"

Weights: bf16 only. Its continuous batching tells an answer when it has ended, so there are no times to first tokens of
several requests (and no shared prefixes).
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
import transformers
from lines import Cannot, serve

BLOCK = 256  # tokens of a block of its cache; twice as many blocks as are needed
BATCH_TOKENS = 512


class Telling(transformers.generation.streamers.BaseStreamer):
    """Hears of every token; the first that it hears of is the prompt."""

    def __init__(self, tell: Any) -> None:
        self._tell, self._count = tell, -1

    def put(self, value: Any) -> None:
        self._count += 1
        if self._count:
            self._tell(0, self._count)

    def end(self) -> None:
        pass


class Transformers:
    weights = ("bf16",)
    hello = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def __init__(self) -> None:
        self._batches: Any = None

    def prepare(self, ask: dict[str, Any]) -> None:
        pass

    def load(self, ask: dict[str, Any]) -> str:
        self.close()
        torch.set_num_threads(ask["threads"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            ask["model"], dtype=torch.bfloat16
        ).eval()
        if ask["requests"] > 1:
            config = transformers.GenerationConfig(
                do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=ask["longest"]
            )
            limits = transformers.ContinuousBatchingConfig(
                num_blocks=2 * -(-ask["tokens"] // BLOCK) + ask["requests"],
                max_batch_tokens=BATCH_TOKENS,
            )
            self._batches = self._model.init_continuous_batching(
                generation_config=config, continuous_batching_config=limits
            )
            self._batches.start()
        return f"{self.hello}, bf16"

    def generate(self, prompts: list[list[int]], tokens: list[int], tell: Any) -> None:
        if len(prompts) > 1:
            self._several(prompts, tokens, tell)
            return
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens[0],
                max_new_tokens=tokens[0], pad_token_id=0, eos_token_id=None, streamer=Telling(tell),
            )  # fmt: skip

    def _several(self, prompts: list[list[int]], tokens: list[int], tell: Any) -> None:
        if set(tokens) == {1}:
            raise Cannot("it tells answers when they have ended")
        names = [
            self._batches.add_request(prompt, max_new_tokens=count)
            for prompt, count in zip(prompts, tokens, strict=True)
        ]
        left = dict(zip(names, range(len(names)), strict=True))
        while left:
            result = self._batches.get_result(timeout=600)
            if result is None:
                raise Cannot("no answer in 600 s")
            if result.is_finished() and result.request_id in left:
                at = left.pop(result.request_id)
                if len(result.generated_tokens) != tokens[at]:
                    raise Cannot(f"{len(result.generated_tokens)} of {tokens[at]} tokens came")
                tell(at, tokens[at])

    def close(self) -> None:
        if self._batches is not None:
            self._batches.stop(block=True)
            self._batches = None


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    serve(Transformers())
