"""Metrics: numbers that describe the outcome of a run."""
