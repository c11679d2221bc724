"""What runs on CUDA in our own words: Triton kernels, and decode steps recorded as graphs.

Triton comes with torch's CUDA builds; where it is missing, stock operations do the same. Nothing here is imported on
machines without a GPU, except by tests, which run the kernels in Triton's interpreter.
"""
