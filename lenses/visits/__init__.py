"""Helpers of lenses that read or change values wherever the model passes a point."""
