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


def slo_of(**bounds: float | None) -> Slo:
    """The promise of these bounds, for flags. Raises BadConfig for one that is not positive."""
    given = {name: value for name, value in bounds.items() if value is not None}
    try:
        return Slo(**given)
    except ValueError as error:
        raise BadConfig(str(error)) from None


def parse_promise(text: str) -> Promise:
    """Read `PATTERN:ttft=0.5,priority=1`. Raises BadConfig."""
    pattern, _, rest = text.rpartition(":")
    bounds: dict[str, float] = {}
    priority = 0
    try:
        for each in rest.split(","):
            name, _, value = each.partition("=")
            if name.strip() == "priority":
                priority = int(value)
            else:
                bounds[SLO_FIELDS[name.strip()]] = float(value)
    except (KeyError, ValueError):
        raise BadConfig(f"{text!r} is no promise", hint=HINT) from None
    if not pattern:
        raise BadConfig(f"the promise {text!r} does not say whose it is", hint=HINT)
    return Promise(pattern=pattern, slo=slo_of(**bounds), priority=priority)


def promise_to(tenant: str, promises: Sequence[Promise]) -> Promise | None:
    """The first that fits the tenant."""
    return next((each for each in promises if fnmatchcase(tenant, each.pattern)), None)
