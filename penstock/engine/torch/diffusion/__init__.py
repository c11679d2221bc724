"""Masked diffusion language models: an answer is a canvas of masks that is filled in any order, block by block.

    families.py   what the config.json and the tensors of LLaDA and Dream mean
    attention.py  attention without a causal mask; keys and values kept per head, the most useful of them only
    unmask.py     from hidden states to (token, confidence), in bounded slices of logit rows
    canvas.py     the tokens of one answer and which of them are still masked
    model.py      one forward over answers in different phases
    infill.py     what is guessed right in the middle of a known text

A forward sees an answer in one of three phases:

    full      all positions, nothing is kept: the first of a block
    refresh   all positions; keys and values outside the active block are chosen and kept
    reuse     the positions of the active block, which attend to what is kept and to themselves

Which phase is next is said by the job's program (core.canvas), not here.
"""
