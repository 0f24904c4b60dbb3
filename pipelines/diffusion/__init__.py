"""Diffusion pipelines: the wrapper, its runs, guidance branches and text encoders."""
