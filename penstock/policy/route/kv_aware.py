"""The replica that holds nearly all of the prompt, if one does; else the session's, or the lowest QPS.

Source: `kvaware` of the vLLM production stack, which asks LMCache's controller what each engine holds.

Idea: what replicas hold is known and not guessed. It decides only where it is nearly everything: the best match is
taken when at most `missing_tokens` of the prompt are not there.

    tokens held >= prompt - missing_tokens   -> the replica with the most, each in turn among equals
    else                                     -> route.session

Parameters
    missing_tokens   default 2,000        key, window_s   of the session, see there

Where we differ: the default lets every prompt below 2,000 tokens go by the match, also one of 0 tokens, as the stack's
does; there the first engine of the list wins then, here the session decides when nobody holds anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from penstock.policy.route import Decision, View
from penstock.policy.route.pick import Turns
from penstock.policy.route.session import Session


@dataclass(slots=True)
class KvAware:
    needs_blocks: ClassVar[bool] = True
    missing_tokens: int = 2000
    key: Literal["program", "tenant"] = "program"
    window_s: float = 60.0
    _session: Session = field(init=False, compare=False, repr=False)
    _turns: Turns = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.missing_tokens < 0:
            raise ValueError(f"missing_tokens must be at least 0, got {self.missing_tokens}")
        self._session, self._turns = Session(key=self.key, window_s=self.window_s), Turns()

    def decide(self, view: View) -> Decision:
        able = view.candidates()
        hits = view.hits(able) if able else []
        most = max(hits, default=0)
        if not most or most < view.request.prompt.num_tokens - self.missing_tokens:
            return self._session.decide(view)
        chosen = self._turns.most(view.names(able), hits)
        return Decision(chosen, f"holds {most} of {view.request.prompt.num_tokens} tokens")
