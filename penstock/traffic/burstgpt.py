"""BurstGPT: CSV with Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type.

The second version inserts "Session ID" (of conversations only) and "Elapsed time" (seconds from the call to its end at
the source; not a time to first token), so columns are found by name in both. The tenant is the model and the class of
caller, as in "ChatGPT/conversation" and "GPT-4/api", because their lengths and burstiness differ.

Rules. A row of 0 request and 0 response tokens tells nothing and is dropped. A response of 0 tokens to a prompt is a
call that failed at the source: dropped and counted as that, or kept (`failures="keep"`) as a call that asks for one
token, so that the load of the failed prompts is there. The published rows themselves are downloaded by the user; this
reader is built to their schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TextIO

from penstock.traffic.rows import Drop, Row, Source, csv_rows, size_row

COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")
SESSION, ELAPSED = "Session ID", "Elapsed time"
LogType = Literal["conversation", "api"]


class Call(NamedTuple):
    """One row as published. `session` and `elapsed_s` are None where a version or a row has none."""

    at_s: float
    model: str
    num_request: int
    num_response: int
    log_type: str
    session: str | None = None
    elapsed_s: float | None = None

    @property
    def has_failed(self) -> bool:
        return self.num_response == 0

    @property
    def tenant(self) -> str:
        return tenant_of(self.model, self.log_type)


def log_type_of(text: str) -> str:
    """ "Conversation log" is "conversation"."""
    return text.strip().lower().removesuffix("log").strip() or "unknown"


def tenant_of(model: str, log_type: str) -> str:
    """("GPT-4", "API log") is "GPT-4/api"."""
    return f"{model.strip() or 'unknown'}/{log_type_of(log_type)}"


def calls_of(file: TextIO) -> Iterator[Call | Drop]:
    """The rows of either version."""
    for record in csv_rows(file):
        try:
            session = (record.get(SESSION) or "").strip()
            elapsed = (record.get(ELAPSED) or "").strip()
            yield Call(
                float(record["Timestamp"]),
                record["Model"].strip(),
                int(record["Request tokens"]),
                int(record["Response tokens"]),
                record["Log Type"],
                session or None,
                float(elapsed) if elapsed else None,
            )
        except (TypeError, ValueError, AttributeError):
            yield Drop("unreadable row", ",".join(str(value) for value in record.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstGpt:
    """What to read: calls of one log type or one model only, failures dropped or kept. A reader like any other."""

    failures: Literal["drop", "keep"] = "drop"
    log_type: LogType | None = None
    model: str | None = None

    def __call__(self, file: TextIO, source: Source) -> Iterator[Row | Drop]:
        for call in calls_of(file):
            yield call if isinstance(call, Drop) else self._row(call)

    def _row(self, call: Call) -> Row | Drop:
        if self.log_type is not None and log_type_of(call.log_type) != self.log_type:
            return Drop(f"not of the {self.log_type} log")
        if self.model is not None and call.model != self.model:
            return Drop(f"not of the model {self.model}")
        if call.num_request == 0 and call.num_response == 0:
            return Drop("neither request nor response tokens")
        if call.has_failed and call.num_request > 0 and self.failures == "drop":
            return Drop("failed at the source (0 response tokens)")
        row = Row(call.at_s, call.num_request, max(1, call.num_response), call.tenant)
        return size_row(row if call.session is None else row._replace(session=call.session))


read = BurstGpt()
VARIANTS = {
    "burstgpt-conversation": BurstGpt(log_type="conversation"),
    "burstgpt-api": BurstGpt(log_type="api"),
    "burstgpt-with-failures": BurstGpt(failures="keep"),
}
