"""Checkpoints as people bring them, each read into the tensors that the loader asks for by their Hugging Face names.

    stored.py       what a reader of checkpoints is
    tensors.py      folders of safetensors files
    scheme.py       what `quantization_config` of a config.json says; imports no torch
    packed.py       weights of few bits in safetensors: which tensors belong to one weight, and who reads them
    gptq.py, awq.py, compressed.py, fp8.py      one way of packing each
    groups.py       the parts of a weight that share scales, and what a slice of it needs
    join.py         weights of several forms made into one layer
    gguf/           GGUF files: configuration, tokenizer and tensors from one file

Whole numbers stay whole: a weight of 4 or 8 bits leaves its reader as `Quantised`, its codes and scales unchanged.
What no `Quantised` can hold is dequantised, and if the file meant it to be small, quantised again to 8 bits; `said` of
a reader tells which of its weights were.
"""
