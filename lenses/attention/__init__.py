"""Helpers of lenses on attention."""
