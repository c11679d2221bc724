"""The modelled twin of every port, and the loop on which waiting takes no time.

Refuses: real resources, threads, and importing mechanisms. It sees ports (core) and numbers (cost), nothing else.
"""
