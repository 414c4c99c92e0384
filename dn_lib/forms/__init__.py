"""Chapters 1 to 4 and the studies in plain PyTorch: the definitions, on any device."""
