"""Accessors of text encoders: the hidden states of their layers as plain tensors, even if the layers return tuples.

    hidden = run.text_encoder.layers_output[4]          # (batch, tokens, features)
    run.text_encoder.layers_output[4] = hidden * 2      # the rest of the tuple stays as it is
    run.text_encoder.layers_input[0]                    # the embedding

Language models have the same accessors, see `diffsight.pipelines.language.accessors`.
"""

from collections.abc import Iterable

from diffsight.extending import Envoy, Target, tree_of
from diffsight.pipelines.language.accessors import LayerAccessors

_HINTS = {  # by names that a pipeline does not have
    ("save", "save_image"): 'images are saved one by one, as in run.images[0].save("image.png")',
    ("show", "display", "plot", "view"): "images are shown one by one, as in run.images[0].show()",
    ("run", "sample", "draw", "predict", "forward"): "images are drawn with generate, as in "
    'model.generate("a red circle", seed=0).images[0]',
    ("cuda", "cpu", "half", "float", "bfloat16"): 'a pipeline is moved or cast with to, as in model.to("cuda")',
    ("latents",): "latents belong to a step, as in step.latents; output_type='latent' returns the last ones",
    ("eval", "train", "state_dict"): "it belongs to the modules of a pipeline, such as model.unet",
}


class EncoderEnvoy(LayerAccessors, Envoy):
    """The envoy of a text encoder, or of any component with the standard name `layers`."""


class HasEncoders:
    """Adds text encoders with accessors to the envoy of a pipeline."""

    def _hint(self, name: str, known: Iterable[str]) -> str:
        for names, hint in _HINTS.items():
            if name in names:
                return f"; {hint}"
        encoders = [part for part in self._names() if part.startswith("text_encoder")]
        if encoders and name in ("layers", "layers_input", "layers_output"):
            return f"; layers are those of a text encoder: .{encoders[0]}.{name}"
        return super()._hint(name, known)

    def _handle(self, target: Target) -> Envoy:
        kind = EncoderEnvoy if "layers" in tree_of(self).names_of(target.owner) else Envoy
        return kind(self._tree, target, self._run, part=self._part)


class PipelineEnvoy(HasEncoders, Envoy):
    """The envoy of a pipeline in one run, or in a row or branch of it."""
