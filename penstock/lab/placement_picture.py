"""What a search for a placement found, as text, as JSON and as a picture: the rate a device of all it tried."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from penstock.lab.placement import SHARE, Placed, goodput
from penstock.policy.place import Decision, Tried
from penstock.report.files import new_figure, save_figure

SHOWN = 3  # alternatives of each way
DRAWN = 12  # bars of each way
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def ranked(decision: Decision) -> list[Tried]:
    """The best first; of equals the smaller."""
    return sorted(decision.tried, key=lambda each: (-each.per_device, each.unit.devices))


def text_of(placed: Placed) -> str:
    asked, site = placed.asked, placed.site
    lines = [
        f"steps     {placed.source}: modelled, nothing ran",
        f"judged by {placed.evaluator}, {asked.num} requests a try, seed {asked.seed}, {placed.num_tried} tries",
        f"promises  P{100 * SHARE:.0f} of TTFT within {asked.ttft_s:g} s and of TPOT within {asked.tpot_s:g} s",
        f"site      {site.nodes} x {site.devices_per_node} devices, "
        + ("fast links between nodes" if site.has_fast_links else "KV stays on a node"),
        "",
    ]
    best = placed.best
    if best is None:
        lines.append(
            "nothing keeps these promises, whatever the rate: loosen one, or take faster devices"
        )
    else:
        name, decision = best
        found = decision.deployment
        assert found is not None
        lines.append(f"place     {found}")
        lines.append(
            f"          {name}; {found.rate_per_s:.2f} requests/s on {found.devices} devices = "
            f"{found.per_device:.2f} requests/s a device"
        )
    lines += ["", f"{'way':<16} {'req/s/device':>12} {'devices':>8}  placement"]
    for name, decision in placed.ways:
        found = decision.deployment
        if found is None:
            lines.append(f"{name:<16} {'-':>12} {'-':>8}  {decision.why}")
        else:
            lines.append(f"{name:<16} {found.per_device:>12.2f} {found.devices:>8}  {found}")
        for tried in ranked(decision)[:SHOWN]:
            lines.append(
                f"{'':<16} {tried.per_device:>12.2f} {tried.unit.devices:>8}    tried {tried.unit}"
            )
    return "\n".join(lines)


def table_of(placed: Placed) -> dict[str, object]:
    """For JSON."""
    return {
        "is_simulation": True,
        "source": placed.source,
        "evaluator": placed.evaluator,
        "num_tried": placed.num_tried,
        "promises": {"ttft_s": placed.asked.ttft_s, "tpot_s": placed.asked.tpot_s, "share": SHARE},
        "requests": placed.asked.num,
        "seed": placed.asked.seed,
        "site": dataclasses.asdict(placed.site),
        "best": None if placed.best is None else placed.best[0],
        "ways": {name: _way(decision) for name, decision in placed.ways},
    }


def _way(decision: Decision) -> dict[str, object]:
    found = decision.deployment
    told = None
    if found is not None:
        told = {
            "groups": [
                {"unit": dataclasses.asdict(unit), "count": count} for unit, count in found.groups
            ],
            "devices": found.devices,
            "rate_per_s": found.rate_per_s,
            "goodput_per_device": found.per_device,
        }
    tried = [
        {
            "unit": str(each.unit),
            "devices": each.unit.devices,
            "goodput_per_device": each.per_device,
        }
        for each in ranked(decision)
    ]
    return {"deployment": told, "why": decision.why, "tried": tried}


def plot(path: Path, placed: Placed) -> None:
    """Write a PNG (or what the suffix says). Raises MissingExtra without matplotlib."""
    rows = [
        (str(tried.unit), tried.per_device, colour)
        for (_, decision), colour in zip(placed.ways, COLOURS, strict=False)
        for tried in ranked(decision)[:DRAWN]
    ]
    figure = new_figure(9, 1.5 + 0.25 * len(rows))
    axes = figure.subplots()
    axes.barh(
        [name for name, _, _ in rows], [rate for _, rate, _ in rows], color=[c for *_, c in rows]
    )
    axes.invert_yaxis()
    axes.set_xlabel("requests/s a device within both promises")
    asked = placed.asked
    told = ", ".join(f"{name} {goodput(decision):.2f}" for name, decision in placed.ways)
    axes.set_title(f"TTFT {asked.ttft_s:g} s, TPOT {asked.tpot_s:g} s: {told}", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)
