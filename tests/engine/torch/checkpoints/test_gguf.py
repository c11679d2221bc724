"""GGUF files compute what transformers computes with the weights they hold."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from penstock.core.errors import BadModel
from penstock.engine.folder import local_folder, model_facts
from penstock.engine.torch.build import EngineConfig
from penstock.engine.torch.checkpoints.gguf.blocks import exact, numbers
from penstock.engine.torch.checkpoints.gguf.format import KINDS, read_header
from penstock.engine.torch.open import open_executor
from penstock.engine.torch.ports import ShardSpec
from penstock.engine.torch.weights import WeightFolder
from tests.engine.torch.checkpoints.folders import CPU, Kept, decoder_of, logits, reference
from tests.engine.torch.checkpoints.gguf_files import write_gguf
from tests.engine.torch.driver import GREEDY, Driver
from tests.engine.torch.models import DEEPSEEK_YARN, LATENT, LONGROPE, SIZE, saved

BY_NAME = {kind.name: kind for kind in KINDS.values()}


def opened(path: Path) -> Path:
    place = local_folder(path)
    assert place is not None
    return place


FAMILIES = [
    ("llama2", Kind.F32),
    ("llama3", Kind.Q8_0),
    ("llama-yarn", Kind.F16),
    ("llama-biased", Kind.Q4_0),
    ("qwen2", Kind.Q8_0),
    ("qwen3", Kind.BF16),
    ("gemma2", Kind.Q8_0),
    ("gemma3", Kind.Q8_0),
    ("phi3", Kind.Q8_0),
    ("phi3-long", Kind.F32),
    ("mixtral", Kind.Q4_0),
    ("qwen2-moe", Kind.F32),
    ("qwen3-moe", Kind.Q8_0),
    ("deepseek-lite", Kind.F32),
    ("deepseek-v2", Kind.F32),
    ("kimi-k2", Kind.F32),
    ("smollm3", Kind.Q8_0),
    ("granite", Kind.Q8_0),
    ("olmo2", Kind.Q8_0),
]


@pytest.mark.parametrize(("name", "kind"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_families(model_root: Path, tmp_path: Path, name: str, kind: Kind) -> None:
    _, model = saved(model_root, name)
    more: dict[str, object] = {}
    if name == "phi3-long":
        more = {"phi3.rope.scaling.attn_factor": float((1 + np.log(8) / np.log(64)) ** 0.5)}
    if name == "gemma3":
        more = {"gemma3.attention.sliding_window_pattern": 3}
    if (
        name == "deepseek-lite"
    ):  # the file states one of two temperatures, which are one in published models
        alike = {**DEEPSEEK_YARN, "mscale": DEEPSEEK_YARN["mscale_all_dim"]}
        config = DeepseekV2Config(**{**SIZE, **LATENT}, q_lora_rank=None, rope_parameters=alike)
        model = DeepseekV2ForCausalLM(config)
    meant = write_gguf(tmp_path / "m.gguf", model, kind, more=more)
    if name.startswith("gemma"):  # the file does not say it: heads' widths are the rule
        for layer in meant.model.layers:
            layer.self_attn.scaling = model.config.head_dim**-0.5
    place = opened(tmp_path / "m.gguf")
    assert (place / "tokenizer.json").exists()
    method = Kept()
    decoder, said = decoder_of(place, method)
    assert (logits(decoder) - reference(meant)).abs().max() < 1e-3
    bits = {Kind.Q8_0: 8, Kind.Q4_0: 4}.get(kind)
    assert {form[:2] for form in method.forms} == (set() if bits is None else {(bits, 32)})
    assert said == (None if bits is None else f"GGUF: {kind.name} as stored")


@pytest.mark.parametrize("name", ["llama2", "qwen2"])
def test_as_transformers_reads_it(model_root: Path, tmp_path: Path, name: str) -> None:
    """Its own reader of GGUF: logits and greedy text."""
    _, model = saved(model_root, name)
    write_gguf(tmp_path / "m.gguf", model, Kind.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, local_files_only=True
    ).eval()
    decoder, _ = decoder_of(opened(tmp_path / "m.gguf"), Kept())
    ids = np.array([3 + (7 * at) % 500 for at in range(9)])
    assert (logits(decoder, ids) - reference(theirs, ids)).abs().max() < 1e-3
    plain = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    text = theirs.generate(torch.tensor(ids)[None], **plain)[0]
    ours = list(ids)
    for _ in range(12):
        ours.append(int(logits(decoder, np.array(ours))[-1].argmax()))
    assert ours == text.tolist()


def test_several_kinds_and_files(model_root: Path, tmp_path: Path) -> None:
    """Kinds that are read exactly and kinds that are not, in numbered files, in a folder without anything else."""
    _, model = saved(model_root, "llama2")
    kinds = {"attn_v": Kind.Q5_1, "attn": Kind.Q4_0, "ffn_gate": Kind.Q5_0, "ffn_up": Kind.Q4_1}
    meant = write_gguf(tmp_path / "m.gguf", model, {**kinds, "output.w": Kind.Q8_0}, split=7)
    files = sorted(path.name for path in tmp_path.glob("*.gguf"))
    assert files[0] == f"m-00001-of-{len(files):05}.gguf" and len(files) > 3
    decoder, said = decoder_of(opened(tmp_path), Kept())
    assert (
        said
        == "GGUF: Q4_0, Q5_0, Q8_0 as stored; Q4_1, Q5_1 quantised again, to 8 bits in groups of 32"
    )
    # 8 bits over numbers of 4 or 5: 1/254 of the largest of each group at most
    assert (logits(decoder) - reference(meant)).abs().max() < 0.1
    assert opened(tmp_path / files[2]) == opened(tmp_path)
    (tmp_path / files[1]).unlink()
    with pytest.raises(BadModel, match="00002-of.* is missing"):
        opened(tmp_path)


def test_longrope_of_phi(tmp_path: Path) -> None:
    """Long and short factors are told apart."""
    config = Phi3Config(
        **{**SIZE, "num_attention_heads": 2, "num_key_value_heads": 1},
        original_max_position_embeddings=64,
        rope_parameters={**LONGROPE, "long_factor": [1.5 + at for at in range(12)]},
    )
    write_gguf(tmp_path / "m.gguf", Phi3ForCausalLM(config))
    rope = model_facts(tmp_path / "m.gguf").shape.rope
    assert rope.kind == "longrope" and rope.original_context == 64 and rope.partial == 0.75
    assert rope.short_factors[1] == pytest.approx(1.1) and rope.long_factors[1] == 2.5


@pytest.mark.parametrize("name", [kind.name for kind in KINDS.values() if kind.numbers > 1])
def test_blocks(name: str) -> None:
    """Random blocks, as the `gguf` package reads them; sizes as it knows them."""
    kind, theirs = BY_NAME[name], Kind[name]
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.numbers, kind.num_bytes)
    seed = np.random.default_rng(3)
    data = seed.integers(0, 256, (5, 3, kind.num_bytes), dtype=np.uint8)
    halves = seed.uniform(0.01, 0.02, (5, 3, 2)).astype(np.float16).view(np.uint8)
    for at in HALVES.get(name, (0,)):  # no infinite scales
        data[..., at : at + 2] = halves[..., at % 4 : at % 4 + 2]
    if name == "MXFP4":
        data[..., 0] = 120
    if name == "IQ1_M":  # the scale's 16 bits are the upper 4 of four words
        data[..., 49::2] &= 0x0F
        data[..., 55] |= 0x20
    flat = data.reshape(5, -1)
    want = torch.from_numpy(gguf.quants.dequantize(flat, theirs).copy())
    got = numbers(kind, torch.from_numpy(flat))
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)
    held = exact(kind, torch.from_numpy(flat))
    assert (held is not None) == (name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"))
    assert held is None or torch.equal(held.expand(), want)


HALVES = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def test_shares_of_ranks(model_root: Path, tmp_path: Path) -> None:
    _, model = saved(model_root, "llama2")
    meant = write_gguf(tmp_path / "m.gguf", model, Kind.Q8_0)
    folder = WeightFolder(opened(tmp_path / "m.gguf"), torch.float32, CPU)
    for part in ("self_attn.q_proj", "self_attn.o_proj"):
        name = f"model.layers.1.{part}.weight"
        for dim, axis in (("out", 0), ("in", 1)):
            parts = [folder.get(name, (64, 64), ShardSpec(dim, rank, 2)) for rank in range(2)]  # type: ignore[arg-type]
            assert torch.equal(torch.cat(parts, axis), meant.get_parameter(name))
    with pytest.raises(BadModel, match="cut through groups of 32"):
        folder.weight("model.layers.0.mlp.down_proj.weight", (64, 96), ShardSpec("in", 0, 2))
    name = "model.layers.0.mlp.down_proj.weight"  # as numbers any share will do
    part = folder.get(name, (64, 96), ShardSpec("in", 1, 2))
    assert torch.equal(part, meant.get_parameter(name)[:, 48:])


def test_a_changed_file_is_met_anew(model_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, saved(model_root, "qwen3")[1])
    first = opened(path)
    assert opened(path) == first and first.name == "m"
    write_gguf(path, saved(model_root, "llama2")[1])
    assert opened(path) != first and model_facts(path).shape.family == "llama"


def patched(path: Path, at: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(bytes(whole))


def test_broken_files(model_root: Path, tmp_path: Path) -> None:
    """Each in one error that says what to do."""
    path, whole = tmp_path / "m.gguf", tmp_path / "whole.bin"
    write_gguf(path, saved(model_root, "qwen3")[1], Kind.Q8_0)
    path.rename(whole)
    data = whole.read_bytes()

    def told(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(BadModel) as caught:
            decoder_of(opened(path))
        assert caught.value.hint
        return str(caught.value)

    assert "is not a GGUF file" in told(b"PK\3\4" + data[4:])
    assert "git lfs pull" in told(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "has version 1" in told(data[:4] + b"\1" + data[5:])
    assert "is big-endian" in told(data[:4] + b"\0\0\0\3" + data[8:])
    assert "ends inside its header" in told(data[:200])
    assert "ends inside tensor" in told(data[:-100])
    assert "it has 0 bytes" in told(b"")
    assert "architecture 'rwkv7' is not supported" in told(data.replace(b"qwen3", b"rwkv7"))
    name = b"blk.0.attn_k.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions, and both
    assert "number format 99" in told(data[:at] + b"\x63" + data[at + 1 :])
    assert "lie over each other" in told(data[:at] + b"\x00" + data[at + 1 :])
    assert "blocks of 256" in told(data[:at] + b"\x0e" + data[at + 1 :])
    assert "m.gguf has no tensor" in told(data.replace(name, b"blk.0.attn_w.weight"))
    assert "several GGUF files" in twins(tmp_path, data)


def twins(place: Path, data: bytes) -> str:
    for name in ("a", "b", "mmproj-a"):
        (place / f"{name}.gguf").write_bytes(data)
    with pytest.raises(BadModel) as caught:
        local_folder(place)
    return str(caught.value)


def test_the_package_for_rare_kinds_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(Exception, match="needs the package 'gguf'"):
        numbers(BY_NAME["IQ3_S"], torch.zeros(1, 110, dtype=torch.uint8))
    assert not numbers(BY_NAME["Q6_K"], torch.zeros(1, 210, dtype=torch.uint8)).any()


def test_headers_are_as_the_package_reads_them(model_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, saved(model_root, "gemma2")[1], Kind.Q4_0)
    header, theirs = read_header(path), gguf.GGUFReader(path)
    for tensor in theirs.tensors:
        ours = header.tensors[tensor.name]
        assert ours.first == tensor.data_offset and ours.num_bytes == tensor.n_bytes
        assert ours.shape == tuple(int(size) for size in tensor.shape[::-1])
    fields = {key: field.contents() for key, field in theirs.fields.items() if "GGUF." not in key}
    assert fields == header.metadata


@pytest.mark.parametrize("linear", ["auto", "plain"])
async def test_an_engine_of_a_file(model_root: Path, tmp_path: Path, linear: str) -> None:
    """From the file's name to greedy text, with the kernels of this machine and without."""
    meant = write_gguf(tmp_path / "m.gguf", saved(model_root, "qwen3")[1], Kind.Q8_0)
    config = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=40, linear=linear)  # type: ignore[arg-type]
    executor = open_executor(str(tmp_path / "m.gguf"), config)
    driver = Driver(executor)
    job = driver.job([5, 6, 7, 8], GREEDY)
    await driver.finish([job], 10)
    await executor.stop()
    assert executor.notes["stored"].startswith("GGUF: Q8_0 as stored; computed as ")
    told = reference(meant, np.array([5, 6, 7, 8, *job.outputs[:-1]]))[3:]
    chosen = told.gather(1, torch.tensor(job.outputs)[:, None])[:, 0]
    slack = 1e-3 if linear == "plain" else 0.2 * float(told.std())
    assert (told.amax(1) - chosen).max() < slack
