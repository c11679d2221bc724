"""Which model, tier or tool? The answer is one of the candidates.

No policy of this kind stands in TABLE yet; the view, decision and law come with the first two.
"""
