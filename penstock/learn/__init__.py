"""Where weights change. Refuses: serving.

Only `learn.local` imports torch. It trains the small model that comes along.
"""
