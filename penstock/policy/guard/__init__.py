"""Is it allowed? Allow, redact or deny, with a reason; deny is final.

No policy of this kind stands in TABLE yet; the view, decision and law come with the first two.
"""
