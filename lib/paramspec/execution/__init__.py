"""Execution: results on disk, processes, signals, and the limits of the machine."""
