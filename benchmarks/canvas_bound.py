"""The most that memory can do for a diffusion language model's throughput: no batch beats what computing takes.

    python -m benchmarks.canvas_bound

For each card of `penstock reproduce dllm-serve`, from the same cost model and without a simulation: tokens a second of
static batches of answers of the mean length, up to a batch that fills the card, for the baseline (logits of whole
sequences, all keys kept) and dLLM-Serve's program. `bound`: what dLLM-Serve's largest batch gives against the
baseline's own batch, which is the most that any admissible batch could.
"""

from __future__ import annotations

from penstock.cost.diffusion import CanvasCost, CanvasMemory, CanvasPiece
from penstock.experiments.dllm_serve import CARDS, LENGTH, OURS, WIDTHS, engine_of

BATCHES = (2, 4, 8, 16, 32, 128, 1024)


def tokens_per_s(memory: CanvasMemory, num: int) -> float:
    """Of `num` answers in lockstep, over one block."""
    rule = memory.rule
    cost = CanvasCost(memory.shape, memory.card, has_whole_logits=memory.logits.row_cap is None)
    kept = rule.num_kept(LENGTH - rule.block_tokens)
    total_s = 0.0
    for step in range(rule.steps):
        phase = rule.phase(step)
        tokens = rule.block_tokens if phase == "reuse" else LENGTH
        total_s += cost.seconds([CanvasPiece(phase, tokens, rule.block_tokens, kept)] * num)
    return num * rule.block_tokens / total_s


def main() -> None:
    print(
        f"{'':22}{'batch':>6}  "
        + "".join([f"{num:>8}" for num in BATCHES])
        + "  tokens/s at batches of"
    )
    for card in CARDS:
        ours = engine_of(OURS, card).memory
        most = tokens_per_s(ours, BATCHES[-1])
        for variant in (OURS, *[f"base-{width}" for width in WIDTHS]):
            memory = engine_of(variant, card).memory
            batch = memory.batch(LENGTH)
            rates = "".join([f"{tokens_per_s(memory, num):>8.1f}" for num in BATCHES])
            bound = most / tokens_per_s(memory, batch)
            told = "" if variant == OURS else f"  bound {bound:.2f}x"
            print(f"{card + ' ' + variant:22}{batch:>6}  {rates}{told}")


if __name__ == "__main__":
    main()
