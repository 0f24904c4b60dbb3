"""Helpers of the lenses on text encoders."""
