"""Which virtual loop runs in this thread, if one does: asking asyncio costs a system call, and a simulation asks a lot.

Not in core.clock, which is compiled (core.compiled): what a compiled class keeps is not kept for each thread.
"""

from __future__ import annotations

import asyncio
import threading


class Virtual(threading.local):
    """`loop` None: none does."""

    loop: asyncio.AbstractEventLoop | None = None


VIRTUAL = Virtual()
