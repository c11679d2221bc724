"""One frame of `penstock top`: a snapshot of a running server (gateway.state) as tables, rates from the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

Snapshot = Mapping[str, Any]
NUM_RECENT = 8
LONGEST = 28  # characters of a name
NOTHING = {"role": "any", "memory": "-", "fetched": "-", "moving": "-", "step ms": "-"}


def frame(snapshot: Snapshot, before: Snapshot | None = None, *, url: str = "") -> Group:
    """`before`: an earlier snapshot of the same server; without one there are no rates."""
    parts: list[Table | Text] = [_headline(snapshot, url)]
    parts.append(_models(snapshot, before))
    parts.append(_replicas(snapshot["replicas"]))
    if snapshot["recent"]:
        parts.append(_recent(snapshot["recent"]))
    return Group(*parts)


def _headline(snapshot: Snapshot, url: str) -> Text:
    replicas = snapshot["replicas"]
    alive = sum(each["is_alive"] for each in replicas)
    told = f"penstock {snapshot['version']}  {url}  {alive} of {len(replicas)} replicas alive"
    return Text(told + ("  DRAINING" if snapshot["is_draining"] else ""), style="bold")


def _table(*columns: str) -> Table:
    """The first column is a name, which goes on in a second line where the terminal is narrow; others are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(columns):
        is_name = place == 0
        justify: Literal["left", "right"] = "left" if is_name else "right"
        table.add_column(name, justify=justify, no_wrap=not is_name, overflow="fold")
    return table


def _short(name: str) -> str:
    """Its end: names of foreign models are paths, and what tells replicas apart stands last."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _models(snapshot: Snapshot, before: Snapshot | None) -> Table:
    table = _table("model", "in flight", "tokens/s", "prompt tokens/s", "generated", "prefix hits")
    earlier = {each["name"]: each for each in before["models"]} if before is not None else {}
    seconds = snapshot["at"] - before["at"] if before is not None else 0.0
    for model in snapshot["models"]:
        was = earlier.get(model["name"])
        looked_up = model["looked_up_tokens"]
        table.add_row(
            Text(_short(model["name"])),
            f"{model['in_flight']:.0f}",
            _rate(model, was, "generated_tokens", seconds),
            _rate(model, was, "prompt_tokens", seconds),
            f"{model['generated_tokens']:,.0f}",
            f"{model['cached_tokens'] / looked_up:.0%}" if looked_up else "-",
        )
    return table


def _rate(model: Snapshot, was: Snapshot | None, name: str, seconds: float) -> str:
    if was is None or seconds <= 0:
        return "-"
    return f"{max(0.0, model[name] - was[name]) / seconds:,.0f}"


def _replicas(replicas: Sequence[Snapshot]) -> Table:
    """Without columns in which there is nothing to tell."""
    rows = [_row(each) for each in sorted(replicas, key=lambda replica: replica["replica"])]
    names = [
        name
        for name in (rows[0] if rows else {"replica": ""})
        if any(str(row[name]) != NOTHING.get(name) for row in rows)
    ]
    table = _table(*names)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _row(each: Snapshot) -> dict[str, str | Text]:
    total = each["total_blocks"]
    moving = f"{each['moving_in']} in {each['moving_out']} out"
    state, style = state_of(each)
    return {
        "replica": Text(_short(each["replica"])),
        "role": each["role"],
        "state": Text(state, style=style),
        "run": f"{each['num_running']}",
        "wait": f"{each['num_waiting']}",
        "prefill": f"{each['waiting_tokens'] + each['prefill_tokens']:,}",
        "memory": f"{1 - each['free_blocks'] / total:.0%}" if total else "-",
        "fetched": fetched_of(each),
        "moving": moving if each["moving_in"] or each["moving_out"] else "-",
        "step ms": f"{each['step_s'] * 1e3:.1f}" if each["step_s"] else "-",
        "age s": f"{each['age_s']:.1f}",
    }


def state_of(report: Snapshot) -> tuple[str, str]:
    """A word, and how it is coloured."""
    if not report["is_alive"]:
        return "dead", "bold red"
    if report.get("is_suspect"):
        return "silent", "yellow"
    if report["is_draining"]:
        return "draining", "cyan"
    return "alive", "green"


def fetched_of(report: Snapshot) -> str:
    """Cached blocks that came from each place so far."""
    told = [f"{num:,} {place}" for place, num, *_ in report.get("brought") or () if num]
    return ", ".join(told) or "-"


def _migrated(event: Snapshot) -> str:
    told = f"{event['request']}: {event['source']} -> {event['target']} ({event['mode']}) {event['outcome']}"
    if event["num_blocks"]:
        told += f", {event['num_blocks']} blocks in {event['stages']} stages"
    if event["pause_s"] is not None:
        told += f", paused {event['pause_s'] * 1e3:.1f} ms"
    return told


def _recent(events: Sequence[Snapshot]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ago", justify="right", no_wrap=True)
    table.add_column("what happened, and why")
    for event in reversed(events[-NUM_RECENT:]):
        table.add_row(f"{event['ago_s']:.0f} s", Text(told_of(event)))
    return table


def told_of(event: Snapshot) -> str:
    """One line."""
    kind, why = event["kind"], event.get("why") or ""
    if kind == "steered":
        moves = [
            f"{name}: {source} -> {target} ({mode})"
            for name, source, target, mode in event["moves"]
        ]
        denied = [
            f"{each[0]}: {each[1]} -> {each[2]} denied by {each[-1]}" for each in event["denied"]
        ]
        loans = [
            f"{name}: {creditor} keeps {count} blocks for {debtor}"
            for name, debtor, creditor, count in event.get("loans", ())
        ]
        told = "; ".join((*moves, *loans, *denied)) or "nothing moves"
    elif kind == "migrated":
        told = _migrated(event)
    elif kind == "scaled":
        parts = [f"+{count} {role}" for role, count in event["add"]]
        parts += [f"drain {name}" for name in event["drain"]]
        parts += [f"{name} becomes {role}" for name, role in event["roles"]]
        parts += [f"{name} gets {count} devices" for name, count in event.get("devices", ())]
        told = ", ".join(parts)
    elif kind == "left":
        told = f"{event['replica']} left"
    else:
        hidden = ("kind", "at", "who", "ago_s", "why")
        told = f"{kind} " + " ".join(
            f"{name}={value}" for name, value in event.items() if name not in hidden
        )
    return f"{event['who']}: {told}" + (f" - {why}" if why else "")
