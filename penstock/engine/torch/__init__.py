"""The real executor: models in PyTorch, on CPU or CUDA. Refuses: scheduling; it runs the plans it is given."""
