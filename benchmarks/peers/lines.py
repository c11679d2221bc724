"""The lines that an engine's driver speaks with `penstock bench engine`, for drivers in Python. Standard library only:
a driver runs in the environment of its engine. What the lines are is told in penstock/lab/speed/peer.py.

    class Driver:
        hello = "engine 1.0"
        weights = ("bf16",)
        def prepare(self, ask): ...            ask: the question as a dict; raise Cannot("why") for what cannot be done
        def load(self, ask): return "engine 1.0, what is loaded"      (or a dict with "about" and "pids")
        def generate(self, prompts, tokens, tell): ...                tell(request, tokens) as they come

    serve(Driver())
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

_lock = threading.Lock()
# Libraries print: what they print goes to stderr, and the lines keep stdout to themselves.
_lines = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


class Cannot(Exception):
    """The engine cannot do this; the reason is told."""


def say(line: dict[str, Any]) -> None:
    with _lock:
        _lines.write(json.dumps(line) + "\n")
        _lines.flush()


def serve(driver: Any) -> None:
    """Answer until told to quit."""
    say({"hello": driver.hello, "weights": list(driver.weights)})
    for line in sys.stdin:
        ask = json.loads(line)
        if ask["do"] == "quit":
            break
        try:
            say(_answer(driver, ask))
        except Cannot as why:
            say({"error": str(why)})
    close = getattr(driver, "close", None)
    if close is not None:
        close()


def _answer(driver: Any, ask: dict[str, Any]) -> dict[str, Any]:
    if ask["do"] == "prepare":
        if ask["weights"] not in driver.weights:
            raise Cannot(f"no weights of {ask['weights']} here")
        driver.prepare(ask)
        return {"ok": True}
    if ask["do"] == "load":
        about = driver.load(ask)
        return {"ok": True, **(about if isinstance(about, dict) else {"about": about})}
    counts, every = ask["tokens"], ask.get("every")

    def tell(request: int, tokens: int) -> None:
        is_due = every is not None and tokens % every == 0
        if tokens == 1 or is_due or tokens == counts[request]:
            say({"request": request, "tokens": tokens})

    driver.generate(ask["prompts"], counts, tell)
    return {"ok": True}
