"""What changes place while running? It exists at its source and fits at its target.

No policy of this kind stands in TABLE yet; the view, decision and law come with the first two.
"""
