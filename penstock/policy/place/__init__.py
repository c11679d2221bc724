"""What goes where before we start? A Deployment that fits hardware and memory.

No policy of this kind stands in TABLE yet; the view, decision and law come with the first two.
"""
