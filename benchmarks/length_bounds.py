"""How good the bound on answer lengths is: how often it is exceeded, and how far above the answer it lies.

Each row of a trace is foretold by those before it (penstock.cost.lengths): when it arrives, and again after every
`--every` tokens that it writes, as a scheduler asks. Told are, for each way of keeping the history,

    at arrival    share of answers longer than the bound of q asked at arrival (1 - q is promised)
    on the way    the same over all bounds asked, one for every `--every` tokens written
    over          mean of bound / answer, at arrival and on the way: 1 would be to know
    loss          mean pinball loss at arrival, tokens: what is too much counts 1 - q, what is too little q. Least for
                  the true quantile, so it tells who is nearer where both keep their promise

With --held-out only the second half of a trace is judged, and beside the histories stands a forest (extra `forest`)
that has learned from the first half and learns nothing more.

    python benchmarks/length_bounds.py data/azure_2023_conv_200.csv [TRACE ...] [--q 0.95] [--held-out] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec.structs import replace

from penstock.core.events import Finished
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Job, Request, RequestId, Sampling, Slo
from penstock.core.views import Lengths
from penstock.cost.forest import ForestLengths
from penstock.cost.lengths import History, RecentLengths
from penstock.traffic import open_trace

ENDED = Finished(
    at=0.0, who="", request="", answer=0, reason="stop", arrived_at=0.0, admitted_at=None,
    first_token_at=None, last_token_at=None, num_prompt=1, num_cached=0, num_output=1,
    num_preemptions=0, tenant="", priority=0, slo=Slo(),
)  # fmt: skip
HISTORIES = {
    "window 1,000": History(),
    "window 200": History(window=200),
    "window 1,000 by prompt size": History(by=("prompt",)),
    "window 1,000, 500 seeds": History(seeds=500),
}


def rows_of(path: Path, limit: int | None) -> Iterator[tuple[int, int]]:
    """(prompt, answer) tokens of every request."""
    for _, item in open_trace(path, limit=limit, rate_per_s=1.0):
        if isinstance(item, Request) and item.true_output:
            yield item.prompt.num_tokens, item.true_output


def job_of(num_prompt: int, cap: int) -> Job:
    request = Request(
        id=RequestId(""),
        model="",
        prompt=TracedPrompt(num_prompt),
        sampling=Sampling(max_tokens=cap),
    )
    return Job(
        seq=0, request=request, answer=0, arrived_at=0.0, hashes=[], num_prompt=num_prompt, max_tokens=cap
    )  # fmt: skip


def measure(
    rows: Sequence[tuple[int, int]], lengths: Lengths, judged: range, q: float, every: int
) -> dict[str, float]:
    cap = max(answer for _, answer in rows)
    first: list[tuple[int, int]] = []
    asked: list[tuple[int, int]] = []
    for place, (num_prompt, answer) in enumerate(rows):
        job = job_of(num_prompt, cap)
        if place in judged:
            bounds = []
            for job.num_output in range(0, answer, every):
                bounds.append((lengths.quantile(job, q), answer))
            first.append(bounds[0])
            asked += bounds
        if isinstance(lengths, RecentLengths):
            lengths.observe(replace(ENDED, num_prompt=num_prompt, num_output=answer))

    def exceeded(pairs: Sequence[tuple[int, int]]) -> float:
        return sum(answer > bound for bound, answer in pairs) / len(pairs)

    def over(pairs: Sequence[tuple[int, int]]) -> float:
        return sum(bound / answer for bound, answer in pairs) / len(pairs)

    return {
        "at_arrival": exceeded(first),
        "on_the_way": exceeded(asked),
        "over_at_arrival": over(first),
        "over_on_the_way": over(asked),
        "loss": loss(first, q),
    }


def loss(pairs: Sequence[tuple[int, int]], q: float) -> float:
    return sum(
        max(q * (answer - bound), (1 - q) * (bound - answer)) for bound, answer in pairs
    ) / len(pairs)


def foretellers(
    rows: Sequence[tuple[int, int]], is_held_out: bool
) -> Iterator[tuple[str, Lengths, range]]:
    """Each way to foretell lengths, and the rows it is judged by."""
    half = len(rows) // 2
    for name, history in HISTORIES.items():
        yield (
            name,
            RecentLengths(history),
            range(half if is_held_out else history.enough, len(rows)),
        )
    if is_held_out:
        yield "forest of the first half", ForestLengths(rows[:half]), range(half, len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path, nargs="+")
    parser.add_argument("--q", type=float, default=0.95)
    parser.add_argument("--every", type=int, default=50, help="tokens between two questions")
    parser.add_argument("--limit", type=int, default=20_000, help="rows of each trace")
    parser.add_argument(
        "--held-out", action="store_true", help="judge the second half, a forest too"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    print(f"bound of {args.q:g}; exceeded by (share of answers), and bound / answer")
    for path in args.trace:
        rows = list(rows_of(path, args.limit))
        print(f"{path.name}: {len(rows):,} answers")
        for name, lengths, judged in foretellers(rows, args.held_out):
            told = measure(rows, lengths, judged, args.q, args.every)
            found.append({"trace": path.name, "history": name, **told})
            print(
                f"  {name:28} at arrival {told['at_arrival']:6.1%}  on the way {told['on_the_way']:6.1%}  "
                f"over {told['over_at_arrival']:6.1f} {told['over_on_the_way']:6.1f}  loss {told['loss']:6.1f}"
            )
    if args.json:
        args.json.write_text(
            json.dumps({"q": args.q, "every": args.every, "rows": found}, indent=1)
        )


if __name__ == "__main__":
    main()
