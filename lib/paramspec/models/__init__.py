"""Models: the registry, loading, tokens, and the zoo of micro models.

It imports `specwiki`, which the zoo is taught, and `execution`.
"""
