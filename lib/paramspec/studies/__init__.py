"""Studies: PSS over models, fine-tuning, causal training, hallucination, and their costs."""
