"""Helpers of lenses on the denoising of a diffusion pipeline: scheduler calls, exits, and drawing latents."""
