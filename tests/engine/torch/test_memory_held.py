"""The memory of a serving process: what it holds while it loads, while 64 requests run, and in the largest step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import asyncio, json, sys, threading, time
from pathlib import Path

peak, is_over = [0], threading.Event()

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not is_over.wait(0.002):
        peak[0] = max(peak[0], held())

import torch
from penstock.engine.torch import kernels
from penstock.engine.torch.open import EngineConfig, open_executor
from tests.engine.torch.driver import GREEDY, Driver

folder, config = sys.argv[1], json.loads(sys.argv[2])
kernels.available()
torch.set_num_threads(1)
told = {"before": held()}
threading.Thread(target=watch, daemon=True).start()
executor = open_executor(folder, EngineConfig(device="cpu", threads=1, packed_cache="off", **config))
time.sleep(0.01)
told |= {"loading": peak[0], "loaded": held(), "kv": executor.kv_bytes, "linear": executor.notes["linear"]}
told |= {"beside": executor.beside.total, "others": executor.beside.others}
count, size, budget = json.loads(sys.argv[3])

async def main():
    driver = Driver(executor)
    jobs = [driver.job([(7 * at + place) % 900 + 20 for place in range(size)], GREEDY) for at in range(count)]
    await driver.finish(jobs, 8, budget=budget)
    await executor.stop()

asyncio.run(main())
is_over.set()
told["running"] = peak[0]
print(json.dumps(told))
"""
WIDTH, LAYERS, VOCABULARY = 1024, 6, 4096
LAYER = 12 * WIDTH * WIDTH  # q, k, v and o of one width; gate, up and down of 8/3 of it, about
PASSING = 4 * LAYER + (
    32 << 20
)  # beside what is packed: one layer as it passes through fp32, torch's own buffers
STATED = 48 << 20  # of a step: activations, logits, tables, what the allocator keeps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=8 * WIDTH // 3 // 128 * 128,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    place = tmp_path_factory.mktemp("wide")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    return Path(place)


def measured(folder: Path, config: dict[str, object], count: int, size: int, budget: int) -> Any:
    """Of a process that answers `count` prompts of `size` tokens in steps of up to `budget`."""
    told, steps = json.dumps(config), json.dumps([count, size, budget])
    command = [sys.executable, "-c", PROGRAM, str(folder), told, steps]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=380)
    return json.loads(done.stdout.splitlines()[-1])


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="needs Linux's /proc"
)
WIDTHS: list[tuple[dict[str, object], float]] = [
    ({"dtype": "fp32"}, 4.0),
    ({"dtype": "bf16"}, 2.0),
    ({"dtype": "bf16", "weights": "int8"}, 1.07),
    ({"dtype": "bf16", "weights": "int4"}, 0.57),
]
NAMES = ["fp32", "bf16", "int8", "int4"]


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("config", [config for config, _ in WIDTHS], ids=NAMES)
def test_the_largest_step_stays_within_what_was_set_aside(
    folder: Path, config: dict[str, object]
) -> None:
    """Four prompts of 500 tokens at once, as many as the step that was planned for; all that is not a weight counts."""
    config = config | {"memory_bytes": 128 << 20, "step_tokens": 2000}
    told = measured(folder, config, 4, 500, 2000)
    added = told["running"] - told["loaded"]
    assert told["kv"] <= 128 << 20
    assert added <= told["kv"] + told["beside"], told
    assert added > told["others"], "the step is too small to show anything"


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("config", "each"), WIDTHS, ids=NAMES)
def test_memory_stays_within_what_was_said(
    folder: Path, config: dict[str, object], each: float
) -> None:
    """`each`: bytes of a weight of a layer. Memory that is no file's is counted."""
    budget = 128 << 20
    told = measured(folder, config | {"memory_bytes": budget}, 64, 24, 256)
    dense = 2.0 if config["dtype"] == "bf16" else 4.0
    table = VOCABULARY * WIDTH
    head = table * (1.07 if "weights" in config else dense)
    weights = LAYERS * LAYER * each + table * dense + head
    assert told["kv"] <= budget
    held = {name: told[name] - told["before"] for name in ("loading", "loaded", "running")}
    assert held["loaded"] <= held["loading"] <= weights + told["kv"] + PASSING, (held, weights)
    assert held["running"] <= weights + budget + PASSING + STATED, (held, weights)
