"""How many replicas, in which role? The answer stays within its bounds.

No policy of this kind stands in TABLE yet; the view, decision and law come with the first two.
"""
