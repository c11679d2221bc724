"""What a caller may ask of an answer: how it is drawn, what it must look like, by when it must come.

Read them from core.types, beside the request that carries them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What the caller was promised. Absent bounds are None, never infinity or -1.

    ttft_s: arrival to first token. tpot_s: mean gap between later tokens. deadline_s: arrival to last token.
    weight: value of meeting it, relative to other requests.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"slo.{name} must be a positive number of seconds, got {value}")
        if not self.weight > 0:
            raise ValueError(f"slo.weight must be positive, got {self.weight}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer must be. `text`: a JSON schema, a regular expression, or a grammar in llguidance's Lark."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Defaults are OpenAI's. `top_k` None = all; `logprobs` None = none, 0 = the chosen only.

    `grammar` None: any text will do.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
