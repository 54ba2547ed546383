"""The paper, in its order: value vectors, masks, scoring, PSS."""
