"""Causal tracing: where in a model, and at which tokens, is its knowledge of a subject?

    trace = causal_tracing(model, "The Eiffel Tower is in the city of", "The Eiffel Tower", answer=" Paris")
    trace.effect                    # (layers, tokens): how much of the answer's probability comes back
    trace.plot()

    trace = causal_tracing(
        pipeline, "a red circle", "red", sites=["text_encoder.layers[*]", "unet.**.attn2"],
        metric=shapes_verdict("red circle"),
    )

The embeddings of the subject's tokens are noised, which hides the subject. Then the state at one place is restored from
the clean run. How much of the right output comes back is the indirect effect of that place (Meng et al., "Locating and
Editing Factual Associations in GPT", 2022, section 2; for the text encoder and the denoiser of text-to-image models:
Basu et al., "Localizing and Editing Knowledge in Text-to-Image Generative Models", 2023, section 3).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from diffsight.errors import InputError
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.layers import Layers
from diffsight.lenses.metrics.metric import Metric, Outcome
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.effect_plots import effect_bars, effect_map
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import CurveSection, HeatMapSection, Section, distinct
from diffsight.lenses.tokens.choosing import check_count
from diffsight.lenses.tracing.image_trace import trace_images
from diffsight.lenses.tracing.language_trace import trace_language
from diffsight.lenses.tracing.subject_noise import Noise
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.numbers import as_number
from diffsight.pipelines.seeds import as_seed


@dataclass(frozen=True, eq=False)
class CausalTrace(LensResult):
    """How much of an output comes back when one place is restored.

    `save(folder)` writes `trace.png`, `trace.safetensors` and `lens.json`.

    Attributes:
        model: The name of the model.
        prompt: The prompt.
        subject: The words whose embeddings are noised.
        metric: What was measured, such as the probability of " Paris".
        sites: The rows: the layers, or the paths of modules.
        columns: The tokens, or one column.
        values: The mean metric over noise samples with one place restored, (sites, columns).
        spread: The standard deviation of the metric over noise samples, (sites, columns).
        clean: The metric of the clean run.
        corrupted: The mean metric with noise and nothing restored.
        noise: The standard deviation of the noise, relative to that of the embeddings.
        samples: The number of noise samples.
        passes: The number of forward passes of the model, or of calls of the pipeline.
        seed: The seed of the noise, and of the image.
        arguments: Further arguments of the model.
    """

    model: str
    prompt: str
    subject: str
    metric: str
    sites: tuple[str, ...] = field(repr=False)
    columns: tuple[str, ...] = field(repr=False)
    values: torch.Tensor = field(repr=False)
    spread: torch.Tensor = field(repr=False)
    clean: float
    corrupted: float
    noise: float
    samples: int
    passes: int
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def effect(self) -> torch.Tensor:
        """The indirect effect, (sites, columns): the metric with a place restored minus that with nothing restored."""
        return self.values - self.corrupted

    def top(self, count: int = 10) -> list[tuple[str, str, float]]:
        """Return the site, the column and the effect of the places with the largest effects."""
        count = min(check_count("count", count), self.effect.numel())
        places = self.effect.flatten().topk(count).indices.tolist()
        found = [divmod(place, len(self.columns)) for place in places]
        return [(self.sites[i], self.columns[j], float(self.effect[i, j])) for i, j in found]

    def plot(self) -> Figure:
        """Plot the effect: a map of layers and tokens, or bars."""
        if len(self.columns) == 1:
            spread = self.spread[:, 0] if self.samples > 1 else None
            return effect_bars(self.effect[:, 0], spread, self.sites, self._title(), self._label())
        return effect_map(self.effect, self.sites, self.columns, "token", self._title(), self._label())

    def preview(self) -> Figure:
        return self.plot()

    def sections(self) -> list[Section]:
        rows, columns = distinct(self.sites), distinct(self.columns)
        if len(columns) == 1:
            return [CurveSection(self._title(), "site", rows, {"effect": self.effect[:, 0].tolist()}, self._label())]
        return [HeatMapSection(self._title(), rows, columns, self.effect, self._label(), ("site", "token"))]

    def files(self) -> dict[str, Callable[[Path], None]]:
        tensors = {"values": self.values, "spread": self.spread, "effect": self.effect}
        return {
            "trace.safetensors": partial(save_file, {n: t.contiguous() for n, t in tensors.items()}),
            "trace.png": partial(write_figure, self.plot),
        }

    def record(self) -> dict[str, Any]:
        kept = ("model", "prompt", "subject", "metric", "clean", "corrupted", "noise", "samples", "passes", "seed")
        record = {"lens": "causal_tracing"} | {name: getattr(self, name) for name in kept}
        lists = {name: list(getattr(self, name)) for name in ("sites", "columns")}
        return record | lists | {"top": [list(one) for one in self.top()], "arguments": dict(self.arguments)}

    def _title(self) -> str:
        return f"{self.prompt} (noised: {self.subject})"

    def _label(self) -> str:
        return f"rise of {self.metric}"


@takes_inverted
@repeatable
def causal_tracing(
    model: LanguageModel | DiffusionModel,
    prompt: str,
    subject: str,
    *,
    sites: str | Sequence[str] = "layers",
    layers: Layers = None,
    window: int = 1,
    answer: str | int | None = None,
    metric: Metric | Callable[[Outcome], Any] | None = None,
    noise: float = 3.0,
    samples: int = 10,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> CausalTrace:
    """Noise the subject of a prompt, restore one place at a time, and measure how much of the output comes back.

        causal_tracing(model, "The Eiffel Tower is in the city of", "Eiffel Tower", answer=" Paris")
        causal_tracing(model, prompt, subject, sites="mlps", window=10)
        causal_tracing(pipeline, "a red circle", "red", sites="unet.**.attn2", metric=shapes_verdict("red circle"))

    Args:
        model: A language model, or a pipeline.
        prompt: The prompt.
        subject: Words of the prompt whose embeddings are noised; in a pipeline, in every text encoder.
        sites: In a language model: "layers", "attentions" or "mlps", or paths and patterns of modules, restored at each
            token. In an encoder-decoder model the names mean the decoder, and the subject is noised in the encoder,
            whose modules are given by paths such as "encoder.block[*]". In a pipeline: paths or patterns of modules in
            text encoders and denoisers, restored at all positions and in all steps of the conditional branch.
        layers: The layers of named sites, in a language model. Default: all.
        window: In a language model: the number of layers or modules around each one that are restored together.
        answer: In a language model: the token whose probability is measured. Default: the likeliest next token.
        metric: In a pipeline: a metric such as `shapes_verdict`, or a function of the result of one row.
        noise: The standard deviation of the noise, relative to that of the token embeddings.
        samples: The number of noise samples to average over.
        batch_size: The number of rows in a pass.
        seed: The seed of the noise, and of every image.
        progress: Whether to show a progress bar.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Further arguments of the model.

    Returns:
        The metric by site and token.

    Raises:
        InputError: Before anything runs, if the subject is not in the prompt, or another argument is not valid.
        PointNotFoundError: A path does not exist.
    """
    samples = check_count("samples", samples)
    batch_size = check_count("batch_size", batch_size)
    window = check_count("window", window)
    scale = as_number(noise)
    if scale is None or not 0 < scale < math.inf:
        raise InputError(f"noise must be a number above 0, not {noise!r}")
    if not isinstance(model, (LanguageModel, DiffusionModel)):
        raise InputError(f"causal_tracing takes a LanguageModel or a DiffusionModel, not {type(model).__name__}")
    if not isinstance(prompt, str) or not isinstance(subject, str):
        raise InputError("prompt and subject must be strings: one prompt, and words of this prompt")
    check_options(causal_tracing, model, arguments)
    noising = Noise(float(scale), samples, as_seed(seed))
    if isinstance(model, LanguageModel):
        if metric is not None:
            raise InputError("metric is for pipelines: a language model is measured by the probability of `answer`")
        chosen = (sites, layers, window, answer)
        traced = trace_language(model, prompt, subject, *chosen, noising, batch_size, progress, arguments)
    else:
        given = {"layers": layers is not None, "window": window != 1, "answer": answer is not None}
        for name in (name for name, is_given in given.items() if is_given):
            raise InputError(f"{name} is for language models: in a pipeline, sites are paths and patterns")
        traced = trace_images(
            causal_tracing, model, prompt, subject, sites, metric, noising, batch_size, progress, arguments
        )
    return CausalTrace(
        model=model.label if isinstance(model, LanguageModel) else model.source,
        prompt=prompt,
        subject=subject,
        metric=traced.metric,
        sites=traced.sites,
        columns=traced.columns,
        values=traced.values.mean(0),
        spread=traced.values.std(0) if samples > 1 else torch.zeros(traced.values.shape[1:]),
        clean=traced.clean,
        corrupted=float(traced.corrupted.mean()),
        noise=float(noise),
        samples=samples,
        passes=traced.passes,
        seed=int(seed),
        arguments=arguments,
    )
