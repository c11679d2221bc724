"""Promises by tenant: which classes of service a trace's tenants belong to.

*/api:ttft=2,tpot=0.1,priority=1      tenants whose name fits the pattern before the colon
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from penstock.core.errors import BadConfig
from penstock.core.types import Slo

SLO_FIELDS = {"ttft": "ttft_s", "tpot": "tpot_s", "deadline": "deadline_s", "weight": "weight"}
HINT = "write PATTERN:NAME=VALUE,... with ttft, tpot, deadline (seconds), weight, priority"


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What tenants that fit `pattern` (shell wildcards) are promised. Lower priority goes first."""

    pattern: str
    slo: Slo = Slo()
    priority: int = 0


def parse_promise(text: str) -> Promise:
    """Read `PATTERN:ttft=0.5,priority=1`. Raises BadConfig."""
    pattern, colon, rest = text.rpartition(":")
    bounds: dict[str, float] = {}
    priority = 0
    try:
        for each in rest.split(","):
            name, _, value = each.partition("=")
            if name.strip() == "priority":
                priority = int(value)
            else:
                bounds[SLO_FIELDS[name.strip()]] = float(value)
        if not colon or not pattern:
            raise KeyError(text)
        return Promise(pattern=pattern, slo=Slo(**bounds), priority=priority)
    except (KeyError, ValueError) as error:
        told = str(error) if str(error).startswith("slo.") else f"{text!r} is no promise"
        raise BadConfig(told, hint=HINT) from None


def promise_to(tenant: str, promises: Sequence[Promise]) -> Promise | None:
    """The first that fits the tenant."""
    return next((each for each in promises if fnmatchcase(tenant, each.pattern)), None)
