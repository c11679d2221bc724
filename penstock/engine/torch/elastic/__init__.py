"""Experts of a mixture in device processes of their own, of which there may be more or fewer while requests run."""
