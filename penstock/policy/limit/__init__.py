"""How much may each holder use? Caps of at least the floor, summing to at most the supply.

No policy of this kind stands in TABLE yet; the view, decision and law come with the first two.
"""
