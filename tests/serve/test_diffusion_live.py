"""A diffusion language model over HTTP: streamed by blocks, the same text at once, and a wrong policy refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import pytest

from penstock.engine.folder import DEFAULT_FOLDER
from tests.engine.torch.canvases import saved_canvas
from tests.serve.test_serve import Running, needs_model, penstock

ASK = {"prompt": [3, 4, 5, 6], "max_tokens": 70, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and the tokenizer of the default model."""
    made, _ = saved_canvas(tmp_path_factory.mktemp("canvases"), "llada")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEFAULT_FOLDER / name, made / name)
    return made


@pytest.mark.slow
@needs_model
def test_blocks_stream_and_policies_show(folder: Path) -> None:
    server = Running(str(folder), "--policy", "dllm-serve")
    try:
        asked = {**ASK, "model": folder.name}
        whole = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()
        assert whole["usage"]["completion_tokens"] == 70
        assert whole["choices"][0]["finish_reason"] == "length"
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**asked, "stream": True}, timeout=60
        ) as stream:
            lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
        pieces = [json.loads(line)["choices"][0]["text"] for line in lines]
        assert "".join(pieces) == whole["choices"][0]["text"]
        assert 3 <= len(pieces) <= 4  # blocks of 32, 32 and 6, and what the detokeniser held back
        odd = httpx.post(f"{server.url}/v1/completions", json={**asked, "top_p": 0.5}, timeout=60)
        assert "top_p has no meaning" in odd.json()["error"]["message"]
        assert 'policy="diffusion"' in httpx.get(f"{server.url}/metrics").text
    finally:
        server.process.terminate()
        server.process.wait(20)


@pytest.mark.slow
@needs_model
def test_another_policy_is_refused_at_the_start(folder: Path) -> None:
    process = penstock("serve", str(folder), "--port", "0", "--device", "cpu")
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "is a diffusion language model" in said and "--policy dllm-serve" in said
