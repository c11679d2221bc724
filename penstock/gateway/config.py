"""What an operator may set about the front door."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """The `[gateway]` table.

    api_keys: key -> tenant; empty = no keys asked, every caller is tenant "default".
    cors_origins: sites whose pages may call us; "*" = any. The playground needs none.
    max_queue: answers under way at once (prompts x n of all callers); more are told 429.
    model_defaults: temperature, top_p and the like default to the model's generation_config.json, not to OpenAI's.
    isolate_tenants: tenants never share cached prompt blocks.
    thread_above_chars: longer prompts are tokenised in a thread; None = never (a virtual clock allows no threads).
    stall_timeout_s: a client that takes no byte for so long is dropped; None = never.
    tools: how models write calls of tools, see gateway.marks; "auto" = as their chat templates show, "off" = never.
    reasoning: "auto" = thoughts are told apart where the chat template knows them; "off" = never.
    retry_after_s: what refused callers are told when the service names no time.
    runtime_adapters: callers may load and unload LoRA adapters, which are read from folders of this machine.
    runtime_devices: callers may have replicas spread the experts of their model over more or fewer devices.
    request_prefix: start of every request id, None = a random one per process. Set it where runs must be equal.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: dict[str, str] = field(default_factory=dict)
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 32 * 1024 * 1024
    max_queue: int = 4096
    max_prompts: int = 1024
    max_answers: int = 128
    max_logprobs: int = 20
    model_defaults: bool = True
    isolate_tenants: bool = False
    thread_above_chars: int | None = 4096
    stall_timeout_s: float | None = 60.0
    tools: Literal["auto", "hermes", "mistral", "llama", "off"] = "auto"
    reasoning: Literal["auto", "off"] = "auto"
    retry_after_s: float = 1.0
    runtime_adapters: bool = False
    runtime_devices: bool = False
    request_prefix: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must lie between 0 and 65535, got {self.port}")
        if not self.host:
            raise ValueError('host may not be empty; "0.0.0.0" listens on all addresses')
        for name in ("max_body_bytes", "max_queue", "max_prompts", "max_answers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_logprobs", "thread_above_chars"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.stall_timeout_s is not None and not 0 < self.stall_timeout_s < math.inf:
            raise ValueError(
                f"stall_timeout_s must be a positive number of seconds, got {self.stall_timeout_s}; "
                "leave it out for the default"
            )
        if not 0 <= self.retry_after_s < math.inf:
            raise ValueError(
                f"retry_after_s must be a number of seconds from 0 up, got {self.retry_after_s}"
            )
        if self.request_prefix == "" or "" in self.cors_origins:
            raise ValueError("request_prefix and cors_origins hold no empty strings")
        for key, tenant in self.api_keys.items():
            if not key or not tenant:
                raise ValueError("api_keys maps each key to a tenant; neither may be empty")
