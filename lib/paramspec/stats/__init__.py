"""Statistics of what was measured: trends over models, contrasts, intervals.

It imports none of the other packages.
"""
