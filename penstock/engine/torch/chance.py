"""Counter-based chance: the uniform of a draw depends on (seed, answer, position) and on nothing else.

So neither the batch a job sits in, nor a preemption, nor the order of arrivals changes what a seeded request
gets. Mixing is splitmix64's finaliser, once over each word; the part that seed and answer decide is mixed once a job.
"""

from __future__ import annotations

_WORD = 0xFFFF_FFFF_FFFF_FFFF
_STRIDE = 0x9E37_79B9_7F4A_7C15


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58_476D_1CE4_E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D0_49BB_1331_11EB) & _WORD
    return x ^ (x >> 31)


def chance_of(seed: int, answer: int) -> int:
    """What `uniform` needs to know of a job; a seed is taken modulo 2^64."""
    state = _mix((seed + _STRIDE) & _WORD)
    return _mix(state ^ ((answer + 1) * _STRIDE & _WORD))


def uniform(chance: int, position: int) -> float:
    """A number in [0, 1)."""
    return float(_mix(chance ^ ((position + 1) * _STRIDE & _WORD)) >> 11) * 2.0**-53
