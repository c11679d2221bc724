"""How a Triton program is launched: quickly, and before the one before it has ended.

Chained (programmatic dependent launch, from Hopper on): a program reads what nobody writes, its weights, then waits for
whatever was launched before it, and lets whatever comes next begin in turn. Each waits before it reads or writes
anything that another writes, so one that has ended means that all before it have. It hides most of what a launch costs
the card, in recorded steps too.

Triton finds the compiled form of a program anew at each launch, by all of its arguments, which costs the host more than
a small program costs the card. Here it is found by what can change it: types, whether pointers are multiples of 16,
whole numbers that are not told to be left open, and the sizes that are fixed when it is compiled.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]

FIRST_CAPABILITY = 9
Compiled = tuple[
    Any, tuple[Any, ...]
]  # and the sizes that it was compiled for, which it is told again
_compiled: dict[tuple[Any, ...], Compiled] = {}


def launch(
    program: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 3, **fixed: Any
) -> None:
    """`args` in the program's order, then `fixed` by name; IS_CHAINED is added where the program has it."""
    if not isinstance(program, triton.JITFunction):  # Triton's interpreter
        if "IS_CHAINED" in program.arg_names:
            fixed["IS_CHAINED"] = False
        program[grid](*map(_plain, args), **fixed)
        return
    device = args[0].device
    key = (id(program), device.index, warps, stages, *fixed.values(), *map(_told, args))
    found = _compiled.get(key)
    if found is None:
        _compiled[key] = _first(
            program, grid, args, fixed, {"num_warps": warps, "num_stages": stages}
        )
        return
    kernel, sizes = found
    kernel[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*args, *sizes)


def _first(
    program: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    fixed: dict[str, Any],
    how: dict[str, Any],
) -> Compiled:
    names = program.arg_names[len(args) :]
    if "IS_CHAINED" in names:
        fixed["IS_CHAINED"] = how["launch_pdl"] = can_chain(args[0].device)
    kernel = program[grid](*map(_plain, args), **fixed, **how)
    return kernel, tuple(fixed[name] for name in names)


@cache
def can_chain(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= FIRST_CAPABILITY


class Open(int):
    """A whole number that a program is not compiled for: it changes from step to step."""


def _told(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, float | Open):
        return type(argument)
    return argument


def _plain(argument: Any) -> Any:
    return int(argument) if isinstance(argument, Open) else argument
