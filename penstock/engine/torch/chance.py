"""Counter-based chance: the uniform of a draw depends on (seed, answer, position) and on nothing else.

So neither the batch a job sits in, nor a preemption, nor the order of arrivals changes what a seeded request
gets. Mixing is splitmix64's finaliser, twice over each word; it runs over whole batches in numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STRIDE = np.uint64(0x9E37_79B9_7F4A_7C15)
_FIRST = np.uint64(0xBF58_476D_1CE4_E5B9)
_SECOND = np.uint64(0x94D0_49BB_1331_11EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def uniforms(
    seeds: NDArray[np.uint64], answers: NDArray[np.uint64], positions: NDArray[np.int64]
) -> NDArray[np.float64]:
    """One number in [0, 1) for each row."""
    state = _mix(seeds + _STRIDE)
    state = _mix(state ^ (answers + np.uint64(1)) * _STRIDE)
    state = _mix(state ^ (positions.astype(np.uint64) + np.uint64(1)) * _STRIDE)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
