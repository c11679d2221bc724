"""How parts reach each other: channels that carry whole messages, in order, to one peer.

Refuses: knowing what a message means. A channel that cannot keep its word closes, and says why to whoever watches.
"""
