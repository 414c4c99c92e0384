"""Experiments with whole models."""
