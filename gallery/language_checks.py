"""The checks of a language model or vision-language model; see `checking.py`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from diffsight.errors import InputError, OutOfOrderError, PointNotFoundError
from diffsight.gallery.check_does_not_apply import CheckDoesNotApply
from diffsight.gallery.diffusion_checks import same_bits
from diffsight.lenses.logit_lens import logit_lens
from diffsight.lenses.tokens.choosing import check_language_model
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.vision_language.model import VisionLanguageModel

_PROMPT = "The Eiffel Tower is in the city of"
_TOKENS = 3  # number of tokens to generate
_OF_GENERATION = ("input_ids", "attention_mask")  # inputs of a forward pass that `generate` takes as well
_PROBABILITIES: tuple[Callable[[Any, int], torch.Tensor], ...] = (
    lambda run, layer: run.attention_probs[layer],
    lambda run, layer: run.layers[layer].self_attn.products[0].attention_probs,  # the first of several in one call
    lambda run, layer: run.layers[layer].self_attn[0].attention_probs,  # a layer has several attentions
)


def language_checks(model: LanguageModel, arguments: Mapping[str, Any]) -> dict[str, Callable[[], str]]:
    """Return the checks of a language model by name."""
    unknown = arguments.keys() - {"prompt", "images"}
    if unknown:
        raise InputError(f"a check of a language model takes prompt (and images), not {', '.join(sorted(unknown))}")
    prompt = arguments.get("prompt")
    if prompt is None:
        prompt = _PROMPT if model.tokenizer is not None else torch.arange(1, 7)[None]
    more = {"images": arguments["images"]} if "images" in arguments else {}
    seen = _Language(model, prompt, more)
    return {
        "unread run": seen.unread_run,
        "layers": seen.layers,
        "steps": seen.steps,
        "attention": seen.attention,
        "image tokens": seen.image_tokens,
        "logit lens": seen.lens,
        "seeds": seen.seeds,
    }


class _Language:
    def __init__(self, model: LanguageModel, prompt: Any, more: dict[str, Any]) -> None:
        self._model, self._prompt, self._more = model, prompt, more

    def unread_run(self) -> str:
        with torch.no_grad():
            logits = self._trace().result["logits"]
            bare = self._model.module(**self._inputs())["logits"]
        assert same_bits(logits, bare), "the logits of a run differ from those of the bare model"
        return "the logits of a run have the bits of the bare call"

    def layers(self) -> str:
        """Compare the output of every layer with the value that an ordinary hook sees."""
        count = len(self._model.layers_output)
        hooked: dict[int, torch.Tensor] = {}

        def keep(layer: int, module: nn.Module, args: tuple, output: Any) -> None:
            hooked.setdefault(layer, _first(output).clone())

        handles = [self._module_of(i).register_forward_hook(partial(keep, i)) for i in range(count)]
        try:
            with torch.no_grad():
                self._model.module(**self._inputs())
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad(), self._trace() as run:
            read = {i: _first(run.layers[i].output).clone() for i in range(count)}
            run.stop()
        wrong = [str(i) for i in read if not same_bits(hooked.get(i), read[i])]
        assert not wrong, f"the outputs of layers {', '.join(wrong)} differ from those of hooks"
        return f"{count}, each with the bits that a hook sees"

    def steps(self) -> str:
        if not self._model.module.can_generate():
            raise CheckDoesNotApply("the model does not generate")
        with self._bare_generates_as_well(), self._generate() as run:
            steps = sum(1 for _ in run.steps)
        config = self._model.module.generation_config
        assert 1 <= steps <= _TOKENS, f"run.steps has {steps}, but at most {_TOKENS} tokens are generated"
        assert steps == _TOKENS or config.eos_token_id is not None, f"run.steps has {steps} for {_TOKENS} tokens"
        return f"{steps}, for at most {_TOKENS} tokens"

    def attention(self) -> str:
        """Check the attention probabilities of the first layer that has any. Rows sum to 1, or to less if part of the
        attention goes to a sink."""
        reasons = []
        for layer, read in product(range(len(self._model.layers_output)), _PROBABILITIES):
            try:
                with torch.no_grad(), self._trace() as run:
                    probabilities = read(run, layer).clone()
                    run.stop()
            except (InputError, PointNotFoundError, OutOfOrderError) as error:
                reasons.append(str(error).splitlines()[0])
                continue
            sums = probabilities.float().sum(-1)
            assert probabilities.min() >= 0, "some probabilities are negative"
            assert sums.max() < 1.01, f"a row of probabilities sums to {sums.max():.3g}"
            return f"probabilities of layer {layer}: {tuple(probabilities.shape)}"
        raise CheckDoesNotApply(reasons[0])

    def image_tokens(self) -> str:
        if not isinstance(self._model, VisionLanguageModel) or "images" not in self._more:
            raise CheckDoesNotApply("no images were passed")
        try:
            grids = self._trace().image_grids[0]
        except InputError as error:
            raise CheckDoesNotApply(str(error).splitlines()[0]) from None
        assert grids, "no image tokens were found"
        return f"{len(grids)} grid{'s' * (len(grids) > 1)}, the first {tuple(grids[0].shape)}"

    def lens(self) -> str:
        try:
            check_language_model("logit_lens", self._model)
        except InputError as error:
            raise CheckDoesNotApply(str(error).removeprefix("logit_lens: ")) from None
        read = logit_lens(self._model, self._prompt, layers=-1, positions=-1, top_k=1, progress=False, **self._more)
        with torch.no_grad():
            run = self._trace()
            logits = run.logits[0, -1].float()
        want = logits.softmax(-1).max()
        assert (read.probabilities[0, 0, 0, 0] - want).abs() < 1e-4, "the last layer predicts something else"
        return f"the last of {read.num_layers} layers predicts what the model predicts"

    def seeds(self) -> str:
        if not self._model.module.can_generate():
            raise CheckDoesNotApply("the model does not generate")
        with self._bare_generates_as_well():
            first, again = (self._generate(do_sample=True, seed=3).result for _ in range(2))
        assert same_bits(first, again), "the same seed gave another text"
        return "the same seed repeats the text"

    def _trace(self) -> Any:
        return self._model.trace(self._prompt, **self._more)

    def _generate(self, **settings: Any) -> Any:
        return self._model.generate(self._prompt, max_new_tokens=_TOKENS, **self._more, **settings)

    @contextmanager
    def _bare_generates_as_well(self) -> Iterator[None]:
        """Raise CheckDoesNotApply if a generation fails in the block and one of the bare model fails too."""
        try:
            yield
        except Exception as error:
            inputs = {name: value for name, value in self._inputs().items() if name in _OF_GENERATION}
            try:
                self._model.module.generate(**inputs, max_new_tokens=_TOKENS)
            except Exception as own:  # of the user's model
                reason = f"{type(own).__name__}: {next(iter(str(own).splitlines()), '')}"
                raise CheckDoesNotApply(f"the bare model does not generate from this prompt: {reason}") from error
            raise

    def _inputs(self) -> dict[str, Any]:
        """Return the inputs of the model in a run."""
        with torch.no_grad(), self._trace() as run:
            _, inputs = run.inputs
            run.stop()
        return inputs

    def _module_of(self, layer: int) -> nn.Module:
        """Return the module of a layer: the first module with the same weights that is not a list of layers."""
        weights = set(map(id, self._model.layers[layer].parameters()))
        modules = (m for m in self._model.module.modules() if not isinstance(m, nn.ModuleList))
        return next(m for m in modules if set(map(id, m.parameters())) == weights)


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
