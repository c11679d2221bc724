"""Many replicas as one service: routing, links to replicas near and far, engine processes and their restarts.

Refuses: deciding. Which replica takes a request is asked of a `route` policy.
"""
