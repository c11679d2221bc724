"""Training from nothing: a resumable loop whose schedule ends either at a number of steps or at a number of minutes.

With `steps` a run is a pure function of its seed: killed and resumed, it gives the same losses as uninterrupted.
With `minutes` the learning rate falls with the clock, so that a run on a busy machine still ends on time.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from penstock.core.errors import BadConfig
from penstock.core.schema import check_schema
from penstock.core.types import SCHEMA
from penstock.learn.local.decoder import Decoder, Shape
from penstock.learn.local.optimise import Optimiser
from penstock.learn.local.stream import Ids, Prepared, Windows

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides what a run learns, apart from the text itself."""

    shape: Shape = field(default_factory=Shape)
    steps: int | None = None
    minutes: float = 45.0
    tokens_per_step: int = 4096
    tokens_at_once: int = 1024
    contexts: tuple[tuple[float, int], ...] = ((0.6, 256), (0.85, 512), (0.95, 1024), (1.0, 2048))
    rate: float = 6e-3
    warmup: float = 0.02
    decay: float = 0.1
    chat_share: float = 0.03
    seed: int = 0
    eval_every: int = 200
    eval_tokens: int = 16_384
    save_minutes: float = 3.0

    def context(self, progress: float) -> int:
        """Windows grow late in the run, when the short range has been learned."""
        return next(
            (size for until, size in self.contexts if progress < until), self.contexts[-1][1]
        )

    def rate_at(self, progress: float) -> float:
        """A short rise, then a straight line to zero."""
        if progress < self.warmup:
            return self.rate * (progress + 1e-3) / (self.warmup + 1e-3)
        return self.rate * max(0.0, 1.0 - progress) / (1.0 - self.warmup)


class Run:
    """One training run in a folder: state in memory, checkpoints and a log of losses on disk.

    Each lane is a thread that takes parts of the batch as it becomes free. Unlike parallel loops inside every
    operation, a lane that is held up by other processes holds up nobody else.
    """

    def __init__(
        self, recipe: Recipe, prepared: Prepared, folder: Path, device: str, lanes: int = 1
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.prepared, self.folder = recipe, prepared, folder
        self.device = torch.device(device)
        self.model = Decoder(recipe.shape).to(self.device)
        self.optimiser = Optimiser(self.model, decay=recipe.decay)
        self.pool = ThreadPoolExecutor(lanes)
        self.windows: dict[int, Windows] = {}
        self.step = 0
        self.seconds = 0.0

    def progress(self) -> float:
        if self.recipe.steps is not None:
            return self.step / self.recipe.steps
        return self.seconds / (60.0 * self.recipe.minutes)

    def batch(self, context: int) -> Tensor:
        """The rows of this step; which ones they are depends on the step, the context and the seed alone."""
        if context not in self.windows:
            self.windows[context] = Windows(self.prepared.train, context, self.recipe.seed)
        count = max(1, self.recipe.tokens_per_step // context)
        return self.windows[context].rows(self.step * count, count).to(self.device)

    def learn(self) -> dict[str, float]:
        """One step; returns what the log keeps about it."""
        began = time.perf_counter()
        progress = self.progress()
        context = self.recipe.context(progress)
        rows = self.batch(context)
        at_once = max(1, self.recipe.tokens_at_once // context)
        parts = [rows[first : first + at_once] for first in range(0, len(rows), at_once)]
        results = list(
            self.pool.map(self._gradients, parts, [len(part) / len(rows) for part in parts])
        )
        gradients = [
            torch.stack(several).sum(0)
            for several in zip(*(each for _, each in results), strict=True)
        ]
        norm = self.optimiser.step(gradients, self.recipe.rate_at(progress), self.pool)
        loss = sum(part for part, _ in results)
        self.step += 1
        self.seconds += time.perf_counter() - began
        return {
            "step": self.step,
            "seconds": round(self.seconds, 2),
            "tokens": self.step * self.recipe.tokens_per_step,
            "context": context,
            "loss": loss,
            "norm": norm,
        }

    def _gradients(self, rows: Tensor, share: float) -> tuple[float, tuple[Tensor, ...]]:
        with precision(self.device):
            mean = self.model.mean_loss(rows[:, :-1], rows[:, 1:]) * share
        return float(mean.detach()), torch.autograd.grad(mean, self.optimiser.everything)

    def save(self) -> None:
        """Write the checkpoint beside the old one, then put it in its place in one move."""
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state(),
            "step": self.step,
            "seconds": self.seconds,
            "shape": self.recipe.shape.as_dict(),
            "schema": SCHEMA,
        }
        partial = self.folder / (CHECKPOINT + ".part")
        torch.save(state, partial)
        os.replace(partial, self.folder / CHECKPOINT)

    def restore(self) -> None:
        """Take up the checkpoint and forget log lines written after it."""
        state = torch.load(self.folder / CHECKPOINT, map_location=self.device, weights_only=True)
        check_schema(f"the checkpoint in {self.folder}", state["schema"])
        if state["shape"] != self.recipe.shape.as_dict():
            raise BadConfig(
                f"the checkpoint in {self.folder} has another shape: {state['shape']}",
                hint="choose another folder with --runs, or start anew with --fresh",
            )
        self.model.load_state_dict(state["model"])
        self.optimiser.restore(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]
        kept = [line for line in read_log(self.folder) if line["step"] <= self.step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        (self.folder / LOG).write_text(text, encoding="utf-8")


def pretrain(
    recipe: Recipe,
    prepared: Prepared,
    folder: Path,
    *,
    device: str,
    resume: bool,
    lanes: int = 1,
    stop_after: int | None = None,
) -> Decoder:
    """Run to the end of the schedule; `stop_after` ends the process's part early, as a kill would (for tests)."""
    run = Run(recipe, prepared, folder, device, lanes)
    if resume and (folder / CHECKPOINT).exists():
        run.restore()
    else:
        (folder / LOG).write_text("", encoding="utf-8")
    saved = time.monotonic()
    with (folder / LOG).open("a", encoding="utf-8") as log, _bar(run) as bar:
        while run.progress() < 1.0 and run.step != stop_after:
            line = run.learn()
            if run.step % recipe.eval_every == 0 or run.progress() >= 1.0:
                line["held_out"] = quick_loss(
                    run.model, prepared.held_out, recipe.eval_tokens, run.device
                )
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.n = min(bar.total, run.progress() * bar.total)
            bar.set_postfix_str(f"step {run.step} loss {line['loss']:.3f}")
            if time.monotonic() - saved > 60.0 * recipe.save_minutes:
                run.save()
                saved = time.monotonic()
    run.save()
    return run.model


def _bar(run: Run) -> tqdm[Any]:
    timed = run.recipe.steps is None
    total = run.recipe.minutes if run.recipe.steps is None else run.recipe.steps
    layout = "{l_bar}{bar}| {n:.1f}/{total:.1f} {unit} [{elapsed}] {postfix}"
    return tqdm(total=total, unit="min" if timed else "step", bar_format=layout, mininterval=1.0)


def precision(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where the hardware multiplies it faster than fp32, otherwise nothing."""
    if device.type == "cuda" or (
        device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def quick_loss(
    model: Decoder, ids: Ids, limit: int, device: torch.device, context: int = 512
) -> float:
    """Mean loss in nats a token on evenly spaced windows of the held-out ids."""
    context = min(context, len(ids) - 1)
    count = max(1, min(limit, len(ids) - 1) // context)
    starts = [index * (len(ids) - 1 - context) // max(1, count - 1) for index in range(count)]
    total = 0.0
    for start in starts:
        row = torch.tensor(ids[start : start + context + 1].astype("int64"), device=device)[None]
        with precision(device):
            total += float(model.token_losses(row[:, :-1], row[:, 1:]).mean())
    return total / count


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log, oldest first."""
    path = folder / LOG
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
