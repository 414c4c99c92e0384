"""Experiments of the four studies after the book: one module for each, which says its prediction first."""
