"""One of several replicas on a machine: which cores, which card and how much memory are its own.

    CPU    every replica gets the same number of threads, together as many as torch would start for one, or as the
           process may use at a time where its control group has a quota (a container's limit): more would be stopped
           for most of every period; where lanes are bound to cores, every replica is bound to cores of its own
    CUDA   cards go round: of R replicas of T cards each on N cards, replica i begins at card (i mod N // T) * T

For keys and values each sets aside an equal part of the memory that one alone would take. What is said (threads, also
by OMP_NUM_THREADS, num_blocks, memory_bytes, a card by its number) is said of each replica and stays. Weights are
packed once and mapped by all: see packed.py.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from penstock.engine.torch.build import EngineConfig, choose_device
from penstock.engine.torch.cores import CAN_BIND, cores_here
from penstock.engine.torch.memory import FREE_SHARE

QUOTAS: tuple[tuple[Path, Path | None], ...] = (
    (Path("/sys/fs/cgroup/cpu.max"), None),
    (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")),
)


def among(config: EngineConfig, *, count: int, index: int) -> EngineConfig:
    """The configuration of replica number `index` of `count`. May bind this process to cores."""
    assert 0 <= index < count
    device = choose_device(config.device)
    if count == 1:
        threads = config.threads if device.type == "cuda" else threads_of(config, 1)
        return config if threads == config.threads else replace(config, threads=threads)
    if device.type == "cuda":
        name, sharers = card_of(
            config, count=count, index=index, num_cards=torch.cuda.device_count()
        )
        config = replace(config, device=name)
    else:
        sharers = count
        config = replace(config, threads=threads_of(config, count))
        if config.lanes > 1 and CAN_BIND:
            os.sched_setaffinity(0, part_of(cores_here(), count, index))
    if config.free_share is None:
        config = replace(config, free_share=FREE_SHARE.get(device.type, 0.5) / sharers)
    return replace(config, packs_once=True)


def threads_of(config: EngineConfig, count: int) -> int | None:
    """Of each process of each of `count` replicas."""
    if config.threads is not None or "OMP_NUM_THREADS" in os.environ:
        return config.threads
    most, allowed = torch.get_num_threads(), quota_cores()
    if allowed is not None and allowed < most:
        most = allowed
    elif count == 1:
        return None  # as torch does by itself
    return max(1, most // (count * config.tensor_parallel))


def quota_cores() -> int | None:
    """Cores' worth of time that this process's control group may use, rounded up; None: as much as there is."""
    for quota, period in QUOTAS:
        try:
            told = quota.read_text(encoding="ascii").split()
            told += [] if period is None else period.read_text(encoding="ascii").split()
        except OSError:
            continue
        if len(told) == 2 and all(each.isdecimal() for each in told):
            return -(-int(told[0]) // int(told[1]))
    return None


def part_of(cores: tuple[int, ...], count: int, index: int) -> tuple[int, ...]:
    """Cores of one of `count`: parts that do not meet, as far as there are cores."""
    if len(cores) <= count:
        return (cores[index % len(cores)],)
    begin, end = (len(cores) * at // count for at in (index, index + 1))
    return cores[begin:end]


def card_of(config: EngineConfig, *, count: int, index: int, num_cards: int) -> tuple[str, int]:
    """(the first card, how many replicas use it)."""
    if ":" in config.device:
        return config.device, count
    groups = max(1, num_cards // config.tensor_parallel)
    place = index % groups
    return f"cuda:{place * config.tensor_parallel}", len(range(place, count, groups))
