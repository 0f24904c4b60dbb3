"""Helpers of the lenses that read hidden states as tokens."""
