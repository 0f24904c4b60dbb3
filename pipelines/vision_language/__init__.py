"""Vision-language models: the wrapper, processors and image tokens."""
