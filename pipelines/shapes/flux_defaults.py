"""Defaults of shapes-flux for which FluxPipeline has no setting.

However its parts are configured, FluxPipeline draws 128 latents a side, as FLUX.1 does, and asks its T5 tokenizer
for 512 tokens. Our VAE makes 16 latents a side, and the text encoders were trained with 16 tokens.
"""

from typing import Any

from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerFast

from diffsight.pipelines.shapes.word_tokenizer import TOKENS

CALL = {"height": 64, "width": 64, "max_sequence_length": TOKENS}  # arguments of a call if the defaults are not set


class BoundedTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that pads and truncates to its `model_max_length` at most, whatever length it is asked for."""

    def set_truncation_and_padding(
        self, padding_strategy: Any, truncation_strategy: Any, max_length: int | None, *args: Any, **kwargs: Any
    ) -> None:
        if max_length is not None:
            max_length = min(max_length, self.model_max_length)
        super().set_truncation_and_padding(padding_strategy, truncation_strategy, max_length, *args, **kwargs)


def set_defaults(pipeline: DiffusionPipeline) -> None:
    """Make a call of the pipeline without arguments draw 64 x 64 pixels from 16 tokens."""
    pipeline.default_sample_size = pipeline.vae.config.sample_size // pipeline.vae_scale_factor
    pipeline.tokenizer_2.__class__ = BoundedTokenizer  # a new object would change what `save_pretrained` writes
