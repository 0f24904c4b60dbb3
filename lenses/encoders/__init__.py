"""Helpers of the lenses that look through text encoders."""
