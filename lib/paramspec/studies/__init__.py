"""Studies: PSS over models, fine-tuning, causal training, hallucination, and what they cost.

They hand questions to `method`, and its answers to `stats`; everything is kept by `execution`.
"""
