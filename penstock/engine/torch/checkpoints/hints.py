"""What to do about broken checkpoints. Imports no torch."""

AGAIN = "the download or copy was cut short: fetch the file again"
SAME = "config.json and the weights must come from the same checkpoint"
