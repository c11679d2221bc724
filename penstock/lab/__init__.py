"""Runs things: plays a trace, drives a URL, simulates, calibrates, replays a log.

Refuses: knowing what is real. It hands traffic to a Service or a URL and a log to `report`.
"""
