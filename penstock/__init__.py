"""Penstock: serve AI models within their latency promises; simulate, plan and improve that service with the same code."""

__version__ = "0.1.0"
