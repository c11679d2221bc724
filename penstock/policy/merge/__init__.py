"""How do updates become one model? Shapes are kept; one update of weight 1 returns itself.

No policy of this kind stands in TABLE yet; the view, decision and law come with the first two.
"""
