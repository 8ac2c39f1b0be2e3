"""Weights in few bits: formats and schemes, how codes and scales are chosen, what was lost."""
