"""Models that read a text whole and give one vector for it: what embeds and what ranks.

shape.py      what a config.json of BERT's relatives means          (no torch)
package.py    how sentence-transformers packages a model: pooling, prompts, lengths          (no torch)
pooling.py    from the states of a text to its vector, for decoders too
model.py      the forward over packed texts; load.py reads the weights
executor.py   the executor port on such a model; open.py is the way in
"""
