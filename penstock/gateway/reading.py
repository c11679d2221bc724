"""All answers of one call: what was heard becomes pieces of text; requests with nothing left to say are closed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.core.errors import StepFailed
from penstock.core.types import Output, TokenLogprob
from penstock.gateway.answer import AnswerText
from penstock.gateway.ask import Ask
from penstock.gateway.exchange import Exchange, Heard
from penstock.gateway.metrics import ModelMeter
from penstock.gateway.shapes import Piece, Usage


class Reading:
    """Choice number = prompt number * n + answer number."""

    def __init__(self, ask: Ask, exchange: Exchange, meter: ModelMeter) -> None:
        self._ask = ask
        self._exchange = exchange
        self._meter = meter
        self.n = ask.n
        self.answers: list[AnswerText] = [
            answer for prompt in range(len(ask.prompts)) for answer in ask.answers(prompt)
        ]
        self.prompt_logprobs: list[tuple[TokenLogprob | None, ...]] = [()] * len(ask.prompts)
        self._speaker: dict[int, int] = {}  # which answer tells of the prompt; the others repeat it
        self._num_left = len(self.answers)
        self.is_over = False
        self._left = [ask.n] * len(ask.prompts)
        self._failure: str | None = None
        self._has_logprobs = ask.sampling.logprobs is not None

    def read(self, heard: Sequence[Heard]) -> Iterable[Piece]:
        """News by choice; what came for one choice since the last call is one piece."""
        if len(heard) == 1:
            piece = self.read_one(*heard[0])
            return (piece,) if piece is not None else ()
        pieces: dict[int, Piece] = {}
        for prompt, output in heard:
            piece = self.read_one(prompt, output)
            if piece is not None:
                known = pieces.get(piece.choice)
                pieces[piece.choice] = piece if known is None else _joined(known, piece)
        return pieces.values()

    def read_one(self, prompt: int, output: Output) -> Piece | None:
        if (
            output.prompt_logprobs
            and self._speaker.setdefault(prompt, output.answer) == output.answer
        ):
            self.prompt_logprobs[prompt] += output.prompt_logprobs
        if output.finish in ("error", "cancelled"):
            self._failure = output.error or "the request was ended inside the server"
            return None  # `submit` raises, and knows more
        choice = prompt * self.n + output.answer
        answer = self.answers[choice]
        if answer.finish is not None:
            return None  # it was stopped early; others of its request still run
        before = answer.num_tokens
        text = answer.push(output)
        self._meter.generated += answer.num_tokens - before
        entries = answer.take_entries() if self._has_logprobs else ()
        if answer.finish is not None:
            self._one_over(prompt, by_service=output.finish is not None)
        return Piece(choice, text, entries, answer.finish, answer.stop_reason)

    def _one_over(self, prompt: int, *, by_service: bool) -> None:
        self._num_left -= 1
        self.is_over = self._num_left == 0
        self._left[prompt] -= 1
        if self._left[prompt] == 0 and not by_service:
            self._exchange.close(prompt)

    def check_ended(self) -> None:
        """Raise StepFailed when the service came back with answers that have no end."""
        if not self.is_over:
            raise StepFailed(self._failure or "the model stopped before the answer was complete")

    def usage(self) -> Usage:
        n, answers = self.n, self.answers
        cached = sum(
            # a preempted job may find its own output in the cache too
            min(len(prompt.ids), max(answer.num_cached for answer in answers[i * n : (i + 1) * n]))
            for i, prompt in enumerate(self._ask.prompts)
        )
        completion = 0 if self._ask.echo_only else sum(answer.num_tokens for answer in answers)
        return Usage(self._ask.num_prompt, completion, cached)


def _joined(first: Piece, then: Piece) -> Piece:
    return Piece(
        first.choice,
        first.text + then.text,
        (*first.entries, *then.entries),
        then.finish,
        then.stop_reason,
    )
