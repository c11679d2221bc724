"""Penstock serves AI models within their latency promises; the same code simulates, plans and improves that service."""

__version__ = "0.1.0"

from penstock.core.compiled import install

install()
