"""Mixtures without the host beside those with it: the same experts, the same sums; on a GPU or interpreted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip(
    "triton",
    reason="Triton comes with torch's CUDA builds; without one, pip install it to interpret",
)

from penstock.engine.folder import model_facts  # noqa: E402
from penstock.engine.torch.build import EngineConfig, build_decoder  # noqa: E402
from penstock.engine.torch.cuda import experts  # noqa: E402
from penstock.engine.torch.cuda.experts import MOST_ROWS, CardMixture  # noqa: E402
from penstock.engine.torch.cuda.linear import CodesLinear, RowLinear  # noqa: E402
from penstock.engine.torch.decoder import Alone, Decoder  # noqa: E402
from penstock.engine.torch.linear import Methods, QuantisingLinear  # noqa: E402
from penstock.engine.torch.mlp import Mixture  # noqa: E402
from tests.engine.torch.models import saved  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def opened(root: Path, name: str, monkeypatch: pytest.MonkeyPatch, *, few: bool = False) -> Decoder:
    """With our programs wherever it runs."""
    rows, codes = RowLinear(), CodesLinear()
    methods = Methods(QuantisingLinear(codes, 8, rows) if few else rows, codes, {"linear": "ours"})
    monkeypatch.setattr("penstock.engine.torch.build.methods_of", lambda *_: methods)
    config = EngineConfig(
        device=DEVICE.type, dtype="fp32", threads=1, num_blocks=6, graphs="off", packed_cache="off"
    )
    folder, _ = saved(root, name)
    return build_decoder(model_facts(folder), config, Alone(), None).decoder


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen2-moe", "mixtral", "deepseek-v3"])
def test_the_same_experts_and_sums(
    model_root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    decoder = opened(model_root, name, monkeypatch)
    plain = {at: layer.mlp for at, layer in enumerate(decoder.layers)}
    assert experts.why_not(decoder) is None
    held = experts.open_mixtures(decoder)
    mixed = [at for at, layer in enumerate(decoder.layers) if isinstance(layer.mlp, CardMixture)]
    assert mixed
    held.set_alone(True)
    for rows in (1, 5, MOST_ROWS) if ON_GPU else (1, 5):
        x = torch.randn(rows, decoder.shape.hidden, generator=torch.Generator().manual_seed(rows))
        counts: dict[int, list[int]] = {}
        with torch.inference_mode():
            for at in mixed:
                before = plain[at]
                assert isinstance(before, Mixture)
                wanted = before(x.to(DEVICE), counts)
                found = decoder.layers[at].mlp(x.to(DEVICE), {})
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert held.taken(rows) == counts
        part = held.taken(1)
        assert all(sum(each) == sum(counts[at]) // rows for at, each in part.items())


def test_experts_in_few_bits_and_of_other_kinds_are_refused(
    model_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = experts.why_not(opened(model_root, "qwen3-moe", monkeypatch, few=True))
    assert told is not None and "few bits" in told
