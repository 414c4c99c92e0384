"""Experiments with the book itself."""
