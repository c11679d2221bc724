"""What fewer bits cost: perplexity of a text under each width of weights and of keys and values.

    perplexity = exp(mean over tokens of -log p(token | those before it))

Every document is read in windows of `context` tokens that begin half a window apart; a window's first half is counted
in the first window only, so every token is counted once and, but for the first window's, with half a window before it.
The log-probabilities are those that a replica gives for prompts, so what is judged is the engine as it serves: packed
weights, its kernels, its cache. Differences between two widths on the same text are much surer than either figure.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from penstock.assemble.presets import policy_tables
from penstock.cluster.predictors import predictors_of_model
from penstock.cluster.spec import ExecutorSpec, policies_of
from penstock.core.errors import BadConfig, StepFailed
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from penstock.engine.folder import DEFAULT_NAME, ModelFacts, local_folder, model_facts
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.lab.speed.side import engine_config
from penstock.report.log import Null

if TYPE_CHECKING:
    from penstock.engine.torch.build import EngineConfig
    from penstock.engine.torch.executor import TorchExecutor

GOALS = {"int8": 0.01, "int4": 0.03}  # more perplexity than bf16 has
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One setting. `more`: perplexity over that of the first setting, less one. `is_met` None: no goal is stated."""

    weights: str
    kv: str
    perplexity: float
    bits_per_byte: float
    num_tokens: int
    more: float
    is_met: bool | None
    notes: dict[str, str]


class Window(NamedTuple):
    """Token ids, of which those from `counted` on are counted."""

    ids: tuple[int, ...]
    counted: int


class Text(NamedTuple):
    """Windows of all documents, and how many bytes the counted tokens are."""

    windows: list[Window]
    num_tokens: int
    num_bytes: float


def documents_of(model: str, files: Sequence[Path]) -> list[str]:
    """Texts of the files; without files those that the default model has not learned from. Raises BadConfig."""
    if files:
        try:
            return [path.read_text(encoding="utf-8") for path in files]
        except OSError as error:
            raise BadConfig(f"cannot read {error.filename}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise BadConfig(f"a text is not UTF-8: {error}") from None
    if model != DEFAULT_NAME:
        raise BadConfig(
            "a text is needed: one that the model has not learned from", hint="give --text FILE"
        )
    from penstock.learn.local.corpus import gather

    return [document.text for document in gather().held_out]


def windows_of(ids: Sequence[int], context: int) -> Iterator[Window]:
    """See the module's text. The first token of a document has nothing before it and is not counted."""
    done = 1
    while done < len(ids):
        end = min(len(ids), context if done == 1 else done + context // 2)
        begin = max(0, end - context)
        yield Window(tuple(ids[begin:end]), done - begin)
        done = end


def windowed(facts: ModelFacts, documents: Sequence[str], *, context: int, limit: int) -> Text:
    """The windows, of `limit` tokens at most. Raises BadModel, BadConfig."""
    from penstock.gateway.folder import load_tokenizer

    tokenizer = load_tokenizer(facts.folder)
    windows, num_tokens, num_bytes = list[Window](), 0, 0.0
    for document in documents:
        ids = tokenizer.encode(document).ids[: limit - num_tokens]
        if len(ids) > 1:
            windows += windows_of(ids, context)
            num_tokens += len(ids) - 1
            num_bytes += len(tokenizer.decode(ids[1:]).encode())
        if num_tokens >= limit - 1:
            break
    if not windows:
        raise BadConfig("the text has less than two tokens", hint="give a longer --text")
    return Text(windows, num_tokens, num_bytes)


def measure(
    model: str,
    documents: Sequence[str],
    settings: Sequence[tuple[str, str]],
    *,
    context: int = 1024,
    limit: int = 50_000,
    on_progress: OnProgress | None = None,
) -> list[Quality]:
    """Of every setting (width of weights, of keys and values). Raises BadConfig, BadModel, StepFailed."""
    tell = on_progress or (lambda done, of, told: None)
    folder = local_folder(model)
    if folder is None:
        raise BadConfig(f"there is no model folder {model}")
    facts = model_facts(folder)
    context = min(context, facts.max_context - 1)
    configs = [config_of(weights, kv, context) for weights, kv in settings]  # all, before any runs
    text = windowed(facts, documents, context=context, limit=limit)
    found: list[Quality] = []
    for (weights, kv), config in zip(settings, configs, strict=True):
        name = f"weights {weights}, kv {kv}"
        nats, notes = asyncio.run(
            scored(model, config, text.windows, lambda done, of, name=name: tell(done, of, name))  # type: ignore[misc]
        )
        each = nats / text.num_tokens
        first = math.log(found[0].perplexity) if found else each
        more = math.exp(each - first) - 1.0
        goal = GOALS.get(weights) if kv == "auto" and settings[0][0] == "bf16" else None
        found.append(
            Quality(
                weights=weights,
                kv=kv,
                perplexity=math.exp(each),
                bits_per_byte=nats / math.log(2) / text.num_bytes,
                num_tokens=text.num_tokens,
                more=more,
                is_met=None if goal is None else more <= goal,
                notes=notes,
            )
        )
    return found


def config_of(weights: str, kv: str, context: int) -> EngineConfig:
    """Room for eight windows at once. Raises BadConfig for what this version does not know."""
    return engine_config(
        weights=weights, kv=None if kv == "auto" else kv, num_blocks=8 * (context // 16 + 2)
    )


async def scored(
    model: str, config: EngineConfig, windows: Sequence[Window], tell: Callable[[int, int], None]
) -> tuple[float, dict[str, str]]:
    """Nats of all counted tokens, and what the engine says of itself."""
    from penstock.engine.torch.open import open_executor

    executor = open_executor(model, config)
    judge = Judge(executor, model, windows, tell)
    try:
        return await judge.nats(), executor.notes
    finally:
        await judge.close()


class Judge:
    """A replica that is asked for the log-probabilities of prompts."""

    def __init__(
        self,
        executor: TorchExecutor,
        model: str,
        windows: Sequence[Window],
        tell: Callable[[int, int], None],
    ) -> None:
        self._windows, self._tell = windows, tell
        self._sums: list[float] = []
        self._left = len(windows)
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._replica = Replica(
            ReplicaConfig(
                num_blocks=executor.num_blocks,
                block_size=executor.block_size,
                has_prefix_cache=False,
            ),
            executor,
            policies_of(policy_tables({}, False)),
            predictors_of_model(ExecutorSpec(), model),
            log=Null(),
            on_outputs=self._hear,
        )
        self._task = asyncio.create_task(self._replica.run())

    async def nats(self) -> float:
        sampling = Sampling(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
        for at, window in enumerate(self._windows):
            name, prompt = RequestId(f"{at}"), TokenPrompt(window.ids)
            self._replica.submit(Request(id=name, model="model", prompt=prompt, sampling=sampling))
        await self._ended
        return math.fsum(self._sums)

    def _hear(self, outputs: tuple[tuple[str, Output], ...]) -> None:
        for name, output in outputs:
            if output.error is not None and not self._ended.done():
                self._ended.set_exception(StepFailed(output.error))
            if output.prompt_logprobs:
                counted = output.prompt_logprobs[self._windows[int(name)].counted :]
                self._sums += [-told.logprob for told in counted if told is not None]
            if output.finish is not None:
                self._left -= 1
                self._tell(len(self._windows) - self._left, len(self._windows))
        if not self._left and not self._ended.done():
            self._ended.set_result(None)

    async def close(self) -> None:
        await self._replica.stop()
        await self._task
