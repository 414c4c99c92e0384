"""Experiments with the operator and its kernels."""
