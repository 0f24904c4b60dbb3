"""Wrappers that make the sub-models of diffusers and transformers pipelines traceable."""
