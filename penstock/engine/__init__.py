"""One replica: the step loop, KV memory, executors, models.

Refuses: knowing other replicas. Only `engine.torch` imports torch; everything else here also runs in simulation.
"""
