"""Recorded programs against the plain forward: the same bits, piece for piece, whatever runs in between."""

from __future__ import annotations

import threading
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.engine.folder import model_facts
from penstock.engine.torch import kernels
from penstock.engine.torch.build import EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone, Decoder, Piece, StepInput
from penstock.engine.torch.kernels import program
from penstock.engine.torch.linear import Weights
from penstock.engine.torch.ports import StepMeta
from penstock.engine.torch.recorded import MOST_ROWS
from tests.engine.torch.models import FAMILIES, saved

pytestmark = pytest.mark.skipif(not kernels.available(), reason=str(kernels.why_not()))
BLOCKS, SIZE = 48, 16


def opened(root: Path, name: str, dtype: str, weights: Weights = "stored") -> Decoder:
    """Weights of 8 bits are multiplied, and recorded, by our kernels on every processor."""
    folder, _ = saved(root, name)
    config = EngineConfig(device="cpu", dtype=dtype, num_blocks=BLOCKS, weights=weights)  # type: ignore[arg-type]
    return build_decoder(model_facts(folder), config, Alone(), None).decoder


def step_of(*chunks: tuple[int, int, int], seed: int = 0) -> StepInput:
    """Chunks of (first block, start, tokens)."""
    random = torch.Generator().manual_seed(seed)
    counts = [tokens for _, _, tokens in chunks]
    ends = [start + tokens for _, start, tokens in chunks]
    width = -(-max(ends) // SIZE)
    table = torch.stack([(torch.arange(width) + first) % BLOCKS for first, _, _ in chunks]).int()
    positions = torch.cat([torch.arange(start, start + tokens) for _, start, tokens in chunks])
    owners = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(counts))
    slots = table[owners, positions // SIZE].long() * SIZE + positions % SIZE
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    meta = StepMeta(
        starts, torch.tensor(ends, dtype=torch.int32), table, slots, max(counts), max(ends)
    )
    ids = torch.randint(3, 500, (sum(counts),), generator=random)
    return StepInput(ids, positions, None, meta)


STEPS = (
    step_of((0, 0, 21)),  # a prompt, then answers beside another prompt
    step_of((0, 21, 1), (4, 0, 5), seed=1),
    step_of((0, 22, 1), (4, 5, 1), seed=2),
    step_of((0, 23, 40), (4, 6, 1), seed=3),
)


def ended(forward: Generator[Piece, None, Tensor]) -> tuple[Tensor, list[Piece]]:
    pieces = []
    while True:
        try:
            pieces.append(next(forward))
        except StopIteration as end:
            return end.value, pieces


CASES = [(name, "bf16") for name in sorted(FAMILIES)] + [
    (name, "fp32") for name in ("qwen3", "gemma2", "deepseek-v2")
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_bits_and_pieces_are_the_plain_ones(model_root: Path, name: str, dtype: str) -> None:
    recorded, plain = (opened(model_root, name, dtype) for _ in range(2))
    plain.spaces = None
    with torch.inference_mode():
        for step in STEPS:
            (got, pieces), (wanted, others) = (
                ended(recorded.forward(step)),
                ended(plain.forward(step)),
            )
            assert got.equal(wanted)
            assert pieces == others


@pytest.mark.parametrize("weights", ("stored", "int8"))
def test_all_of_a_plain_model_is_native(model_root: Path, weights: Weights) -> None:
    if weights == "stored" and not kernels.linear.wins_on_this_machine(torch.bfloat16):
        pytest.skip("this processor multiplies bfloat16 with another library")
    decoder = opened(model_root, "qwen3", "bf16", weights)
    with torch.inference_mode():
        assert decoder.spaces is not None
        space = decoder.spaces.find(decoder.embed(STEPS[0].ids))
    assert space is not None
    assert space.program.num_python == 0
    assert space.program.num_native == 2 * len(decoder.layers)  # one call a piece


def test_a_step_left_in_the_middle_keeps_its_rows(model_root: Path) -> None:
    decoder = opened(model_root, "qwen3", "bf16")
    with torch.inference_mode():
        wanted, _ = ended(decoder.forward(STEPS[0]))
        left = decoder.forward(STEPS[0])
        for _ in range(2 * len(decoder.layers) - 1):
            next(left)
        other = decoder.forward(step_of((20, 0, 30), seed=5))
        for _ in range(5):
            next(other)
        next(left)  # its last piece: the rows are moved out once more
        ended(other)
        forgotten = decoder.forward(step_of((30, 0, 9), seed=6))
        next(forgotten)
        forgotten.close()
        got, _ = ended(left)
        assert got.equal(wanted)


def test_two_threads_use_spaces_of_their_own(model_root: Path) -> None:
    decoder = opened(model_root, "qwen3", "bf16")
    found: dict[int, Tensor] = {}

    def run(at: int) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            for _ in range(5):
                found[at] = ended(decoder.forward(step_of((20 * at, 0, 21))))[0]

    threads = [threading.Thread(target=run, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].equal(found[1])


def test_long_steps_and_gradients_run_plainly(model_root: Path) -> None:
    decoder = opened(model_root, "qwen3", "bf16")
    assert decoder.spaces is not None
    long = step_of((0, 0, MOST_ROWS + 1))
    with torch.inference_mode():
        assert decoder.spaces.find(decoder.embed(long.ids)) is None
    assert decoder.spaces.find(decoder.embed(STEPS[0].ids)) is None


def test_fields_of_both_widths_move() -> None:
    from penstock.engine.torch.kernels.library import AttentionCall

    recorder = program.Recorder(4, torch.float32)
    moving = {
        "num_chunks": "chunks",
        "num_tokens": "rows",
        "query_stride": "rows",
        "slots": "slots",
    }
    for _ in range(2):
        recorder.call(recorder.library.attention, AttentionCall(), moving)
    recorder.end_piece()
    made = recorder.program()
    made.set({"chunks": -7, "rows": 5, "slots": 1 << 40})
    for step in made._steps:
        call = AttentionCall.from_address(step.call)
        assert (call.num_chunks, call.num_tokens, call.query_stride) == (-7, 5, 5)
        assert call.slots == 1 << 40 and call.num_heads == 0 and call.key_stride == 0


def test_pieces_run_on_end_until_somebody_wants_the_thread(model_root: Path) -> None:
    decoder = opened(model_root, "qwen3", "bf16", "int8")
    count = 2 * len(decoder.layers)
    with torch.inference_mode():
        wanted, one_by_one = ended(decoder.forward(STEPS[0]))
        assert len(one_by_one) == count, "a thread without a halt stops behind every piece"
        found: dict[bool, tuple[Tensor, list[Piece]]] = {}
        halt = program.Halt()

        def run() -> None:
            halt.bind()
            with torch.inference_mode():
                for is_asked in (False, True):
                    halt.set(is_asked)
                    found[is_asked] = ended(decoder.forward(STEPS[0]))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    for hidden, _ in found.values():
        assert hidden.equal(wanted)
    assert found[True][1] == one_by_one
    assert found[False][1] == one_by_one[-1:]
