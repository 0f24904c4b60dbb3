"""Helpers of causal tracing and prompt swapping: the rows of language models and of pipelines."""
