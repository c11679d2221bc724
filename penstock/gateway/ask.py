"""A checked body becomes an Ask: what to submit, and how the answers are to be read and shown.

Where the caller is silent the model's makers decide how to sample (generation_config.json, as vLLM has it), and
OpenAI's defaults hold for the rest: 16 tokens for a completion, the rest of the context for a chat.
A default is shortened to what the context has room for; a number the caller gave is not, it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from penstock.core.adapters import Adapter
from penstock.core.canvas import meaningless
from penstock.core.errors import BadRequest, ContextTooLong
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Grammar, ProgramId, Request, RequestId, Sampling, Slo
from penstock.gateway.answer import AnswerText
from penstock.gateway.bodies import ChatBody, CompletionBody, SharedBody, SloBody
from penstock.gateway.config import GatewayConfig
from penstock.gateway.errors import Unsupported
from penstock.gateway.folder import Preferred
from penstock.gateway.marks import FORMS, CallForm, Thinking, thinking_of
from penstock.gateway.messages import plain_messages
from penstock.gateway.parts import Splitter
from penstock.gateway.stop import Stops
from penstock.gateway.structured import grammar_of
from penstock.gateway.text import TextModel
from penstock.gateway.tools import Tool, as_template_wants, behind_thought, call_grammar, offered

N = TypeVar("N", int, float)

COMPLETION_TOKENS = 16  # OpenAI's default
MAX_STOPS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One prompt as ids; `text` where the caller sent text."""

    ids: Sequence[int]
    text: str | None = None


@dataclass(slots=True, kw_only=True)
class Ask:
    """One HTTP call, understood. Choice number = prompt number * n + answer number."""

    id: str
    model: str
    text: TextModel
    prompts: Sequence[Given]
    n: int
    sampling: Sampling
    room_tokens: int | None  # max_tokens as given; None = the default
    default_tokens: int | None  # None = all the context has room for
    stops: Stops | None
    stop_ids: frozenset[int]
    stream: bool
    include_usage: bool
    echo: bool = False
    echo_only: bool = False
    continues: bool = True  # the answer goes on with the prompt's text
    form: CallForm | None = None  # of the calls it may hold
    thinking: Thinking = "never"
    most_calls: int | None = None
    adapter: Adapter | None = None

    def splitter(self) -> Splitter | None:
        """For one answer; None where all of it is said."""
        if self.form is None and self.thinking == "never":
            return None
        return Splitter(self.form, self.thinking, self.most_calls)

    @property
    def num_prompt(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    def answers(self, prompt: int) -> list[AnswerText]:
        """Fresh readers for the answers to one prompt."""
        before = self.prompts[prompt].ids if self.continues else ()
        return [
            AnswerText(
                self.text.detokenizer(before),
                stops=self.stops,
                stop_ids=self.stop_ids,
                min_tokens=self.sampling.min_tokens,
                wants_logprobs=self.sampling.logprobs is not None,
            )
            for _ in range(self.n)
        ]


def sampling_of(
    body: SharedBody, text: TextModel, logprobs: int | None, *, as_model_prefers: bool
) -> Sampling:
    """How tokens are drawn, before `max_tokens` is known: the caller's word, the model's, OpenAI's default."""
    stop_ids = _stop_ids(body, text)
    if not body.ignore_eos:
        stop_ids = (*stop_ids, *sorted(text.eos_ids.difference(stop_ids)))
    own = text.preferred if as_model_prefers else Preferred()
    top_k = _first(body.top_k, own.top_k, 0)
    chosen = Sampling(
        min_tokens=body.min_tokens or 0,
        temperature=_first(body.temperature, own.temperature, 1.0),
        top_p=_first(body.top_p, own.top_p, 1.0),
        top_k=top_k if top_k > 0 else None,
        min_p=_first(body.min_p, own.min_p, 0.0),
        repetition_penalty=_first(body.repetition_penalty, own.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_bias(body.logit_bias or {}, text),
        seed=body.seed,
        grammar=grammar_of(
            body.response_format if isinstance(body, ChatBody) else None, body.structured_outputs
        ),
        logprobs=logprobs,
        stop_ids=stop_ids,
        ignore_eos=bool(body.ignore_eos),
    )
    return _meant(chosen, text, "response_format")


def _meant(chosen: Sampling, text: TextModel, grammar_field: str) -> Sampling:
    """The same. Raises Unsupported for what makes no sense where masks are filled in any order."""
    odd = meaningless(chosen) if text.is_canvas else None
    if odd is not None:
        raise Unsupported(
            f"{odd} has no meaning for a model that fills masks in any order",
            hint="leave it out",
            param=grammar_field if odd == "grammar" else odd,
        )
    return chosen


def _first(given: N | None, preferred: N | None, default: N) -> N:
    return given if given is not None else preferred if preferred is not None else default


def _bias(told: dict[str, float], text: TextModel) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, value in told.items():
        if not key.isdecimal() or int(key) >= text.num_vocabulary:
            raise BadRequest(
                f"logit_bias: {key!r} is not a token id of this model (0 to {text.num_vocabulary - 1})",
                param="logit_bias",
            )
        pairs.append((int(key), value))
    return tuple(sorted(pairs))


def _stop_ids(body: SharedBody, text: TextModel) -> tuple[int, ...]:
    told = body.stop_token_ids or ()
    strange = [id for id in told if id >= text.num_vocabulary]
    if strange:
        raise BadRequest(
            f"stop_token_ids: {strange[0]} is not a token id of this model (0 to {text.num_vocabulary - 1})",
            param="stop_token_ids",
        )
    return tuple(dict.fromkeys(told))


def stops_of(stop: str | list[str] | None) -> Stops | None:
    strings = [stop] if isinstance(stop, str) else stop or []
    if any(not string for string in strings):
        raise BadRequest("stop: a stop string cannot be empty", param="stop")
    if len(strings) > MAX_STOPS:
        raise BadRequest(f"stop: at most {MAX_STOPS} strings are allowed", param="stop")
    return Stops(dict.fromkeys(strings)) if strings else None


def check_shared(body: SharedBody, config: GatewayConfig) -> None:
    """Rules between fields."""
    if body.stream_options is not None and not body.stream:
        raise BadRequest(
            "stream_options is only allowed when stream is true", param="stream_options"
        )
    if (body.n or 1) > config.max_answers:
        raise BadRequest(f"n: at most {config.max_answers} answers are allowed here", param="n")


def check_logprobs(name: str, wanted: int | None, config: GatewayConfig) -> int | None:
    if wanted is not None and wanted > config.max_logprobs:
        raise BadRequest(
            f"{name}: at most {config.max_logprobs} alternatives are allowed here", param=name
        )
    return wanted


def ask_completion(
    body: CompletionBody, text: TextModel, prompts: Sequence[Given], config: GatewayConfig
) -> Ask:
    """What a completion body asks; `requests` are added once the id is known."""
    check_shared(body, config)
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise BadRequest("best_of is only supported when it equals n", param="best_of")
    echo, limit = bool(body.echo), body.max_tokens
    if limit == 0 and not echo:
        raise BadRequest("max_tokens must be at least 1 unless echo is true", param="max_tokens")
    sampling = sampling_of(
        body,
        text,
        check_logprobs("logprobs", body.logprobs, config),
        as_model_prefers=config.model_defaults,
    )
    return Ask(
        id="",
        model=body.model or "",
        text=text,
        prompts=prompts,
        n=n,
        sampling=sampling,
        room_tokens=1 if limit == 0 else limit,
        default_tokens=COMPLETION_TOKENS,
        stops=stops_of(body.stop),
        stop_ids=frozenset(sampling.stop_ids),
        stream=bool(body.stream),
        include_usage=_wants_usage(body),
        echo=echo,
        echo_only=limit == 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """A chat laid out as a prompt: what the model was shown of tools, and how it will begin."""

    words: str
    tools: Sequence[Tool]
    form: CallForm | None
    thinking: Thinking


def lay_out(body: ChatBody, text: TextModel, config: GatewayConfig) -> Laid:
    """Raises BadRequest for messages or tools that the model's template cannot take."""
    form = text.call_form if config.tools == "auto" else FORMS.get(config.tools)
    tools = offered(body.tools, body.tool_choice, form)
    words = text.render(
        plain_messages(body.messages),
        add_generation_prompt=body.add_generation_prompt,
        tools=as_template_wants(tools),
        extras=body.chat_template_kwargs,
    )
    return Laid(
        words=words,
        tools=tools,
        form=form if tools else None,
        thinking=thinking_of(words, text.does_think and config.reasoning == "auto"),
    )


def _chat_grammar(
    body: ChatBody, laid: Laid, text: TextModel, asked: Grammar | None
) -> Grammar | None:
    """What the answer must be: a call, or what `asked` says; thoughts may come before it."""
    if laid.form is not None:
        is_parallel = body.parallel_tool_calls is not False
        forced = call_grammar(
            laid.tools, body.tool_choice, laid.form, text, is_parallel=is_parallel
        )
        if forced is not None and asked is not None:
            raise BadRequest(
                "an answer that must call a tool cannot follow another format",
                param="response_format" if body.response_format else "structured_outputs",
            )
        asked = forced or asked
    return None if asked is None else behind_thought(asked, laid.thinking, text)


def ask_chat(
    body: ChatBody, text: TextModel, ids: Sequence[int], laid: Laid, config: GatewayConfig
) -> Ask:
    """What a chat body asks; `ids` are those of `laid`'s words."""
    check_shared(body, config)
    limit, name = body.max_completion_tokens, "max_completion_tokens"
    if limit is None:
        limit, name = body.max_tokens, "max_tokens"
    if limit == 0:
        raise BadRequest(f"{name} must be at least 1", param=name)
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    wanted = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_of(
        body,
        text,
        check_logprobs("top_logprobs", wanted, config),
        as_model_prefers=config.model_defaults,
    )
    grammar = _chat_grammar(body, laid, text, sampling.grammar)
    sampling = _meant(replace(sampling, grammar=grammar), text, "tool_choice")
    return Ask(
        id="",
        model=body.model or "",
        text=text,
        prompts=[Given(ids=ids)],
        n=body.n or 1,
        sampling=sampling,
        room_tokens=limit,
        default_tokens=None,
        stops=stops_of(body.stop),
        stop_ids=frozenset(sampling.stop_ids),
        stream=bool(body.stream),
        include_usage=_wants_usage(body),
        continues=False,
        form=laid.form,
        thinking=laid.thinking,
        most_calls=1 if body.parallel_tool_calls is False else None,
    )


def _wants_usage(body: SharedBody) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def max_tokens(ask: Ask, prompt: Given) -> int:
    """Output tokens allowed. Raises ContextTooLong when prompt and output do not fit."""
    context, num_prompt = ask.text.context_tokens, len(prompt.ids)
    room = context - num_prompt
    wanted = ask.room_tokens
    if room < 1 or (wanted is not None and wanted > room):
        asked = f" and {wanted} for the completion" if wanted is not None else ""
        raise ContextTooLong(
            f"this model's maximum context length is {context} tokens, but the request has "
            f"{num_prompt} tokens in the prompt{asked}",
            hint="shorten the prompt or ask for fewer tokens",
            param="messages" if not ask.continues else "prompt",
        )
    if wanted is not None:
        return wanted
    return room if ask.default_tokens is None else min(room, ask.default_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Who asks and how the gateway marks what it sends on."""

    tenant: str
    hash_key: bytes
    isolate: bool


def make_requests(ask: Ask, body: SharedBody, origin: Origin) -> list[Request]:
    """One request a prompt, named after the call's id. Raises ContextTooLong."""
    slo = slo_of(body.slo)
    salt = f"{origin.tenant}\0{body.cache_salt or ''}" if origin.isolate else body.cache_salt or ""
    program = ProgramId(body.program) if body.program else None
    model, adapter = ask.model, None
    if ask.adapter is not None:
        model, adapter = ask.adapter.model, ask.adapter.key

    def request(number: int, prompt: Given) -> Request:
        return Request(
            id=RequestId(ask.id if len(ask.prompts) == 1 else f"{ask.id}-{number}"),
            model=model,
            prompt=TokenPrompt(prompt.ids, key=origin.hash_key, adapter=adapter, salt=salt),
            sampling=_bounded(ask, prompt),
            slo=slo,
            n=ask.n,
            tenant=origin.tenant,
            priority=body.priority or 0,
            adapter=adapter,
            cache_salt=salt,
            program=program,
        )

    return [request(number, prompt) for number, prompt in enumerate(ask.prompts)]


def slo_of(told: SloBody | None) -> Slo:
    if told is None:
        return Slo()
    return Slo(
        ttft_s=told.ttft_s, tpot_s=told.tpot_s, deadline_s=told.deadline_s, weight=told.weight
    )


def _bounded(ask: Ask, prompt: Given) -> Sampling:
    """The sampling of one prompt: its own room, and the prompt's logprobs where an echo shows them."""
    limit = max_tokens(ask, prompt)
    return replace(
        ask.sampling,
        max_tokens=limit,
        min_tokens=min(ask.sampling.min_tokens, limit),
        prompt_logprobs=ask.sampling.logprobs if _scores_prompts(ask) else None,
    )


def _scores_prompts(ask: Ask) -> bool:
    """Whether the prompts' tokens are shown with their logprobs."""
    return ask.echo and ask.sampling.logprobs is not None
