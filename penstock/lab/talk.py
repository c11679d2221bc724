"""A conversation with a served model, kept at the client: what was said, and one answer at a time.

Asking is synchronous, since whoever reads a terminal waits anyway; an interrupt cancels the answer, which the server
takes as a client that left, and what was heard of it stays part of the conversation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from penstock.lab.client import Client, Wish


class Talk:
    """Use it inside `with`. Entering looks for the model and raises PenstockError when there is none."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        system: str | None = None,
        is_complete: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        self.system, self.is_complete = system, is_complete
        self._max_tokens = max_tokens
        self._client = Client(url, model=model, api_key=api_key)
        self._runner = asyncio.Runner()
        self._said: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return self._client.url

    @property
    def model(self) -> str:
        return self._client.server.model

    def __enter__(self) -> Self:
        try:
            self._runner.run(self._open())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._runner.run(self._client.__aexit__(None, None, None))
        self._runner.close()

    def clear(self) -> None:
        """Forget what was said."""
        self._said.clear()

    def say(self, text: str, on_text: Callable[[str], None]) -> bool:
        """Ask and hand on the answer's text as it comes. False when an interrupt stopped it. Raises PenstockError."""
        heard: list[str] = []
        try:
            self._runner.run(self._listen(text, heard, on_text))
        except KeyboardInterrupt:
            return False
        finally:
            if heard and not self.is_complete:
                self._said.append({"role": "user", "content": text})
                self._said.append({"role": "assistant", "content": "".join(heard)})
        return True

    async def _open(self) -> None:
        await self._client.__aenter__()
        try:
            await self._client.find_model()
        except BaseException:
            await self._client.__aexit__(None, None, None)
            raise

    async def _listen(self, text: str, heard: list[str], on_text: Callable[[str], None]) -> None:
        async for piece in self._client.tell(self._wish(text)):
            heard.append(piece)
            on_text(piece)

    def _wish(self, text: str) -> Wish:
        if self.is_complete:
            return Wish(prompt=text, max_tokens=self._max_tokens)
        first = [{"role": "system", "content": self.system}] if self.system else []
        turn = {"role": "user", "content": text}
        return Wish(prompt=[*first, *self._said, turn], max_tokens=self._max_tokens)
