"""OpenVINO GenAI for `penstock bench engine`: its continuous batching pipeline, in this process.

    --peer "openvino=VENV/bin/python benchmarks/peers/genai.py"

VENV has openvino-genai and optimum-intel[openvino], which converts. Weights: bf16 as fp16 (what it offers of sixteen
bits), int8, int4. Prefix caching is on, as Penstock's and vLLM's is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from lines import Cannot, serve

KINDS = {"bf16": "fp16", "int8": "int8", "int4": "int4"}
SPARE_GIB = 1
CHUNK = int(os.environ.get("OPENVINO_CHUNK", "512"))


class OpenVino:
    weights = tuple(KINDS)
    hello = f"OpenVINO GenAI {genai.__version__.split('-')[0]}"

    def __init__(self) -> None:
        self._pipeline: Any = None
        self._asked = 0

    def prepare(self, ask: dict[str, Any]) -> None:
        target = folder_of(ask)
        if (target / "openvino_model.xml").exists():
            return
        half = target.with_name(target.name + ".half")
        shutil.rmtree(half, ignore_errors=True)
        half.parent.mkdir(parents=True, exist_ok=True)
        command = [
            Path(sys.executable).parent / "optimum-cli", "export", "openvino", "-m", ask["model"],
            "--task", "text-generation-with-past", "--weight-format", KINDS[ask["weights"]], half,
        ]  # fmt: skip
        done = subprocess.run([str(each) for each in command], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise Cannot(f"optimum-cli failed with {done.returncode}")
        half.rename(target)

    def load(self, ask: dict[str, Any]) -> str:
        self._pipeline = None
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = SPARE_GIB + ask["tokens"] * cache_bytes(ask["model"]) // (1 << 30)
        scheduler.max_num_seqs = max(1, ask["requests"])
        scheduler.max_num_batched_tokens = CHUNK
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": ask["threads"]}
        self._pipeline = genai.ContinuousBatchingPipeline(
            str(folder_of(ask)), scheduler, "CPU", properties
        )
        return f"{self.hello}, {KINDS[ask['weights']]}"

    def generate(self, prompts: list[list[int]], tokens: list[int], tell: Any) -> None:
        pipeline, handles = self._pipeline, {}
        for at, (prompt, count) in enumerate(zip(prompts, tokens, strict=True)):
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles[at] = pipeline.add_request(self._asked, ids, settings(count))
            self._asked += 1
        told = dict.fromkeys(handles, 0)
        while pipeline.has_non_finished_requests():
            pipeline.step()
            read(handles, told, tell)
        read(handles, told, tell)
        short = [at for at in handles if told[at] < tokens[at]]
        if short:
            raise Cannot(f"{told[short[0]]} of {tokens[short[0]]} tokens came")


def read(handles: dict[int, Any], told: dict[int, int], tell: Any) -> None:
    """Tokens that have come since the last step."""
    for at, handle in handles.items():
        while handle.can_read():
            for output in handle.read().values():
                for _ in output.generated_ids:
                    told[at] += 1
                    tell(at, told[at])


def settings(count: int) -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = count
    config.ignore_eos, config.do_sample = True, False
    return config


def cache_bytes(model: str) -> int:
    """Of a token's keys and values, were they of 32 bits; here they are of 16 or 8, so that is room enough."""
    import json

    told = json.loads((Path(model) / "config.json").read_text())
    size = told.get("head_dim") or told["hidden_size"] // told["num_attention_heads"]
    return 2 * 4 * told["num_hidden_layers"] * told["num_key_value_heads"] * size


def folder_of(ask: dict[str, Any]) -> Path:
    return Path(ask["scratch"]) / "openvino" / f"{Path(ask['model']).name}-{KINDS[ask['weights']]}"


if __name__ == "__main__":
    serve(OpenVino())
