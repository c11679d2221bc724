"""More devices for a replica when too many requests are late, fewer when hardly any is and the devices idle.

Source: ElasticMoE (arXiv:2510.02613): the coordinator's estimator scales up when the share of requests within their
promise, over a window, falls below 90 %. There is no code; the rule for fewer is a reconstruction.

Idea: of the requests that were over within `window_s`, the share whose first token came within `ttft_s` is the
attainment. Below `least` every replica that can gets `step` more devices, up to `most_devices`. Above `most`, with less
than `idle` of the blocks in use and nobody waiting, `step` fewer - once fewer requests come than `calm` of those that
came when they were taken in. `cooldown_s` passes between two changes.

Parameters: `ttft_s` (the promise), `window_s`, `least`, `most` (attainment), `idle` (share of blocks), `calm` (share of
arrivals), `step`, `least_devices`, `most_devices`, `cooldown_s`, `every_s`; `adds`: "replicas" brings up another
replica instead, to compare with, and puts none out.

Where we differ: a request that was refused counts as late, and so does one that waits for longer than `ttft_s` by now,
as a burst would otherwise be seen only when its requests have ended. Blocks in use say nothing of how busy devices are
where memory is plenty: arrivals that were too many for fewer devices once are taken to be too many again.

Does not: add replicas, or know how long a change takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from penstock.policy.scale import Decision, View


@dataclass(slots=True)
class Elastic:
    hears_tokens: ClassVar[bool] = True
    ttft_s: float = 1.0
    window_s: float = 10.0
    least: float = 0.9
    most: float = 0.99
    idle: float = 0.5
    calm: float = 0.7
    step: int = 2
    least_devices: int = 1
    most_devices: int = 8
    cooldown_s: float = 60.0
    every_s: float = 1.0
    adds: Literal["devices", "replicas"] = "devices"
    _changed_at: float | None = field(init=False, default=None)
    _too_many: int | None = field(init=False, default=None)  # arrivals at the last step up

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.window_s > 0 and self.every_s > 0):
            raise ValueError("ttft_s, window_s and every_s must be positive")
        if not 0 < self.least <= self.most <= 1:
            raise ValueError(
                f"least and most must be shares in order, got {self.least}, {self.most}"
            )
        if not (0 <= self.idle <= 1 and 0 <= self.calm <= 1):
            raise ValueError(f"idle and calm must be shares, got {self.idle}, {self.calm}")
        if not (self.step >= 1 and 1 <= self.least_devices <= self.most_devices):
            raise ValueError("step, least_devices and most_devices must be 1 or more, in order")

    def decide(self, view: View) -> Decision:
        since = None if self._changed_at is None else view.now - self._changed_at
        able = [each for each in view.active() if each.replica in view.devices]
        if not able or (since is not None and since < self.cooldown_s):
            return Decision()
        late = sum(each.num_waiting for each in able if each.oldest_wait_s > self.ttft_s)
        count = len(view.served) + late
        if not count:
            return Decision()
        met = sum(
            each.ttft_s is not None and each.ttft_s <= self.ttft_s and not each.is_refused
            for each in view.served
        )
        share = met / count
        used = max(1 - each.free_blocks / max(1, each.total_blocks) for each in able)
        change = 0
        if share < self.least:
            change = self.step
        elif (
            share > self.most
            and used < self.idle
            and not any(each.num_waiting for each in able)
            and (self._too_many is None or view.arrived < self.calm * self._too_many)
        ):
            change = -self.step
        why = f"{share:.0%} of {count} requests in time, {used:.0%} of blocks used"
        if self.adds == "replicas":
            have = len(view.active()) + sum(view.starting.values())
            if change <= 0 or have >= view.bounds.most:
                return Decision()
            self._changed_at = view.now
            return Decision(add={"any": 1}, why=why)
        wanted = {
            each.replica: min(
                max(view.devices[each.replica] + change, self.least_devices), self.most_devices
            )
            for each in able
        }
        wanted = {name: count for name, count in wanted.items() if count != view.devices[name]}
        if not change or not wanted:
            return Decision()
        self._changed_at = view.now
        if change > 0:
            self._too_many = view.arrived
        return Decision(devices=wanted, why=why)
