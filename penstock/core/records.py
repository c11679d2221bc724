"""Parents of records that are made by the hundred thousand and that no cycle goes through.

Of a class in a module that is compiled (core.compiled) only the parents are kept of what stands in its brackets: what
its records are like has to come from a parent, and from a module that is not compiled. And where compiled code compares
two that it knows to be of one such class it asks whether they are the same object: one of them is to be an `object`.
"""

from __future__ import annotations

from msgspec import Struct


class Record(Struct, gc=False):
    """Fields can be set."""


class Fact(Struct, frozen=True, gc=False):
    """Read-only. Classes say frozen=True as well, for whoever checks types."""
