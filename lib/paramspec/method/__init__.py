"""The paper, in its order: value vectors, masks, scoring, PSS.

It imports `models` and `specwiki` alone.
"""
