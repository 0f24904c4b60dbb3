"""Shared by everything about sparse autoencoders: their activations, files, activation streams, and training."""
