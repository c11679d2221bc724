"""An engine that answers at once and says so in the right lines: a process without weights, for tests of the harness.

python scripted.py [seconds of work a token: ten of a prompt are one] [widths] [what it cannot]
"""

from __future__ import annotations

import json
import sys
import time

cost_s = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
widths = sys.argv[2].split(",") if len(sys.argv) > 2 else ["bf16"]
cannot = sys.argv[3] if len(sys.argv) > 3 else ""


def say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def work(tokens: float) -> None:
    end = time.process_time() + tokens * cost_s
    while time.process_time() < end:
        pass


sys.stdout.write("what libraries print\n")
say({"hello": "scripted 1", "weights": widths})
for line in sys.stdin:
    ask = json.loads(line)
    if ask["do"] == "quit":
        break
    if ask["do"] == "generate":
        if cannot == "many" and len(ask["prompts"]) > 1:
            say({"error": "one at a time"})
            continue
        if cannot == "live":
            print("out of memory", file=sys.stderr)
            sys.exit(1)
        for request, (prompt, count) in enumerate(zip(ask["prompts"], ask["tokens"], strict=True)):
            work(len(prompt) / 10)
            say({"request": request, "tokens": 1})
            for token in range(2, count + 1):
                work(1)
                if token == count or (ask["every"] and token % ask["every"] == 0):
                    say({"request": request, "tokens": token})
    say({"ok": True, "about": "scripted 1, loaded"})
