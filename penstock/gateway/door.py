"""Who may come in and what every answer carries: API keys, request ids, CORS.

Keys are compared by their digests, looked up in a table, so the time taken says nothing about a key. CORS headers
are sent only to origins the operator listed; browsers ask first by OPTIONS, which needs no key.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from penstock.core.errors import Unauthorized
from penstock.gateway.config import GatewayConfig
from penstock.gateway.wire import Headers

_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Door:
    """Built once from the configuration."""

    def __init__(self, config: GatewayConfig) -> None:
        self._tenants = {_digest(key.encode()): name for key, name in config.api_keys.items()}
        self._any_origin = "*" in config.cors_origins
        self._origins = frozenset(origin.encode() for origin in config.cors_origins)

    def tenant(self, headers: Mapping[bytes, bytes]) -> str:
        """Whose key it is. Raises Unauthorized; without keys everybody is "default"."""
        if not self._tenants:
            return "default"
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise Unauthorized(
                "no API key was given", hint="send it as 'Authorization: Bearer YOUR_KEY'"
            )
        tenant = self._tenants.get(_digest(key.strip()))
        if tenant is None:
            raise Unauthorized("this API key is not known here")
        return tenant

    def request_id(self, headers: Mapping[bytes, bytes], fresh: str) -> bytes:
        """The caller's own id where it is printable and short, else a fresh one."""
        given = headers.get(b"x-request-id", b"")
        return given if _ID.fullmatch(given) else fresh.encode()

    def cors(self, headers: Mapping[bytes, bytes]) -> Headers:
        origin = headers.get(b"origin")
        if origin is None or not (self._any_origin or origin in self._origins):
            return []
        if self._any_origin:
            allowed: Headers = [(b"access-control-allow-origin", b"*")]
        else:
            allowed = [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
        return [*allowed, (b"access-control-expose-headers", b"x-request-id, retry-after")]

    def preflight(self, headers: Mapping[bytes, bytes]) -> Headers:
        """Headers that answer a browser's question before the call."""
        allowed = self.cors(headers)
        if not allowed:
            return []
        asked = headers.get(b"access-control-request-headers", b"authorization, content-type")
        return [
            *allowed,
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", asked),
            (b"access-control-max-age", b"600"),
        ]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
