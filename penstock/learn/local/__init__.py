"""Training on this machine: the default model from its text to its model card. Needs the `train` extra."""

from penstock.learn.local.default import FULL, TINY, train_default
from penstock.learn.local.pretrain import Recipe

__all__ = ["FULL", "TINY", "Recipe", "train_default"]
