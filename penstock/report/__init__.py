"""A log in, something to look at out: numbers, tables, plots.

Refuses: judging. It says what was measured, by which definition, and over how many requests.
"""
