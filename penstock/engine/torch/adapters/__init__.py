"""LoRA adapters: many at once in one batch, over whatever method computes the base.

    y = W x + s B (A x)        for the rows of jobs that use the adapter

places     where in a decoder an adapter may add, by the names of a checkpoint
read       a folder's tensors, checked
bank       A and B of the resident adapters, in slots, and the product that adds them
rows       which rows of a step use which adapter
store      folders, slots, and the thread that loads

The base's product is left as it is; what an adapter adds is computed beside it. A decoder keeps its layers twice: as
they are, for steps in which nobody uses an adapter, and with products that add, so that adapters cost such steps
nothing.
"""
