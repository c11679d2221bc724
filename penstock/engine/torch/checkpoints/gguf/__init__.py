"""GGUF: a model in one file, or in several that are numbered. Its own words are turned into Hugging Face's.

format.py      the file: metadata, and where each tensor lies; imports no torch
config.py      metadata -> config.json
tokenizer.py   metadata -> tokenizer.json and what belongs to it
folder.py      the folder of those files that stands for the model; made once a file
names.py       Hugging Face's names of tensors -> the file's
blocks.py      blocks of quantised numbers -> `Quantised`, or numbers
tensors.py     the `Stored` of all this
"""
