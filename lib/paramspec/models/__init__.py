"""Models: the registry, loading, tokens, and the zoo of micro models."""
