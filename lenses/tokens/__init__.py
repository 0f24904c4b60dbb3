"""Helpers of the lenses on language models: layers and tokens, prompts in batches, predictions."""
