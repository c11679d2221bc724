"""A forward on a card, launched no further ahead of the card than a few pieces.

Launching is quick and the card is not, so a long step would be launched whole before its first layers are computed, and
whoever asks for an interrupt after that would wait for all of it. With AHEAD pieces under way the card never waits, and
a step that is left ends that many pieces later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

import torch
from torch import Tensor

from penstock.engine.torch.decoder import Piece

AHEAD = 3


def paced(
    forward: Generator[Piece, None, Tensor], device: torch.device
) -> Generator[Piece, None, Tensor]:
    """The same pieces."""
    if device.type != "cuda":
        return (yield from forward)
    under_way: deque[torch.cuda.Event] = deque()
    try:
        while True:
            piece = next(forward)
            mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
            mark.record()
            under_way.append(mark)
            if len(under_way) > AHEAD:
                under_way.popleft().synchronize()
            yield piece
    except StopIteration as end:
        hidden: Tensor = end.value
        return hidden
    finally:
        forward.close()


def settle(device: torch.device) -> None:
    """Return when the card is done with what was launched: a step that fetches nothing would be over too soon."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
