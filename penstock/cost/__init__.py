"""Numbers about the outside: hardware, model shapes, step time, energy, output lengths.

Refuses: knowing who asks. Nothing here schedules, sleeps or reads a clock.
"""
