"""Helpers on sites: where in a model a lens patches, ablates or steers."""
