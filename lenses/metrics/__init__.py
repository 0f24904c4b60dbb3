"""Helpers on metrics: numbers that say how a run went."""
