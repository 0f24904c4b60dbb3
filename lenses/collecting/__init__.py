"""Helpers of collect_activations: the values at points of a pipeline, and the files that they are written to."""
