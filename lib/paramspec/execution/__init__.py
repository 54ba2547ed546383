"""How work is run: results on disk, processes, signals, and what of the machine may be used.

It knows nothing of models or of the paper, and imports none of the other packages.
"""
