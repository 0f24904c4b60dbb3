"""HFPipeline: trace any transformers pipeline. It can still be called as usual.

model = HFPipeline("image-classification", model="google/vit-base-patch16-224")     # or a live transformers.pipeline(…)

with model.trace("cat.png") as run:
    run.model.layers[4].output[:, 0] = 0
    run.forward.output.logits               # between `preprocess` and `postprocess`
run.result                                  # what the pipeline returned

with HFPipeline("text-generation", model=folder).generate("Once", max_new_tokens=20, seed=0) as run:
    for step in run.steps:                  # one iteration per generated token
        run.model.layers[4].output[:, -1] += direction
        print(step.text, end="")
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import GeneratorType
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset
from transformers import Pipeline, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline
from transformers.pipelines.pt_utils import PipelineIterator

from diffsight.errors import InputError, PointNotFoundError, suggest
from diffsight.extending import (
    ChangedMethod,
    Clock,
    Model,
    Target,
    children_in,
    flow_of,
    part_targets,
    unwrapped,
    with_gradients,
)
from diffsight.pipelines.folder_checks import check_configurations, check_vocabulary
from diffsight.pipelines.hub_access import cache_only_if_offline
from diffsight.pipelines.language.generation import Choice, GeneratedTokens, GenerationRun, set_generated
from diffsight.pipelines.loading_arguments import UNTRUSTED, with_dtypes
from diffsight.pipelines.loading_errors import explained
from diffsight.pipelines.named_tree import NamedTree
from diffsight.pipelines.pipeline_options import (
    check_options_of_call,
    check_options_of_loading,
    check_options_of_opened,
)
from diffsight.pipelines.seeds import check_seed
from diffsight.pipelines.standard_names import are_layers, is_list, layer_names, model_names, standard_names
from diffsight.pipelines.unread_runs import warn_if_unread
from diffsight.pipelines.valid_text import check_text
from diffsight.pipelines.weights import check_weights, requiring_all_weights

_PARTS = ("tokenizer", "feature_extractor", "image_processor", "video_processor", "processor")  # not modules
_OF_TEXTS = ("tokenizer", "processor")
_METHODS = {"preprocess": "preprocess", "forward": "_forward", "postprocess": "postprocess"}


_generating: ContextVar[tuple[GeneratedTokens | None, bool]] = ContextVar("diffsight_generating", default=(None, False))


class HFRun(GenerationRun):
    """A run of a transformers pipeline."""

    @property
    def result(self) -> Any:
        """The value that the pipeline returned. Reading it runs the pipeline to its end. Raises ScanError in a scan."""
        self._check_no_scan("result")
        return super().result

    def _choice(self, step: int) -> Choice:
        self._check_no_scan(f"steps[{step}].tokens")
        return super()._choice(step)


class HFPipeline(Model):
    """Wraps a transformers pipeline.

    `model` and the other parts of the pipeline (`tokenizer`, `image_processor`, `feature_extractor`, a `vocoder`) are
    envoys, as are its methods `preprocess`, `forward` and `postprocess`. `model` and the models in it have the
    standard names `layers[i]`, `layers[i].self_attn`, `layers[i].mlp` and `ln_final`; language models also have
    `lm_head` and `embed_tokens`.

    Args:
        source: A live `transformers.pipeline(...)`, or its first argument: a task such as "text-classification", or a
            hub id or folder whose task the hub knows.
        arguments: Passed to `transformers.pipeline`, such as `model=…`.

    Raises:
        InputError: `source` is not a pipeline, an argument is unknown, or the files of the model do not hold all of its
            weights.
    """

    _run_class = HFRun

    def __init__(self, source: Pipeline | str | Path, **arguments: Any) -> None:
        if "remote" in arguments:
            raise InputError("remote=: an HFPipeline runs in this process only")
        pipeline = _opened(source, arguments)
        self._wrap(PipelineTree(Target(pipeline, "__call__", "")))

    @property
    def pipeline(self) -> Pipeline:
        """The wrapped pipeline."""
        return self._owner

    def trace(self, *args: Any, seed: int | None = None, grad: bool = False, **kwargs: Any) -> HFRun:
        """Open a run of the pipeline: `with model.trace("a text") as run:`, or `model.trace("a text").result`.

        A step is one call of `model`. If the model generates text, a step lasts from one choice of tokens to the next
        and has `step.tokens` and `step.text`, and `run.stream()` yields the pieces of text. If a list of inputs is
        processed in several batches, a step is one batch. If a list forms one batch (`batch_size=`), `run.rows` are the
        inputs.

        Args:
            args, kwargs: The arguments of the pipeline.
            seed: The seed of the run's own random stream.
            grad: Whether to disable the pipeline's `no_grad`.
        """
        self.check(*args, seed=seed, grad=grad, **kwargs)
        pipeline = self._owner
        generated = GeneratedTokens(_tokenizer(pipeline)) if self._generates_tokens() else None

        def call() -> Any:
            _generating.set((generated, grad))  # in the run's own context
            with _changed_methods(pipeline, generated is not None, grad):
                result = pipeline(*args, **kwargs)
                return list(result) if isinstance(result, PipelineIterator) else result

        again = None if args else partial(self.trace, seed=seed, grad=grad, **kwargs)
        run = self._new_run(call, self._sizes(args, kwargs), again, grad)
        flow_of(run).seed = seed
        warn_if_unread(run, kwargs)
        if generated is not None:
            set_generated(run, generated, self._tree.children_of(self._target)["model"])
        if self._is_one_pass(args, kwargs):
            flow_of(run).clock.is_behind = lambda target: target.name == "postprocess"
        return run

    def check(self, *args: Any, seed: int | None = None, grad: bool = False, **kwargs: Any) -> None:
        """Check the arguments of `trace` or `generate` without opening a run or running anything.

        Raises:
            InputError: The arguments are not valid.
        """
        if seed is not None:
            check_seed(seed)
        for given in (*args, *kwargs.values()):
            check_text("the input", given)
        check_options_of_call(self._owner, kwargs, near={"seed", "grad"})
        if kwargs.get("num_workers") or self._owner._num_workers:
            raise InputError("num_workers: worker processes cannot be traced. Leave it out")

    def generate(self, *args: Any, **kwargs: Any) -> HFRun:
        """The same as `trace`, for a pipeline that generates."""
        if not self._generates():
            raise PointNotFoundError(f"{type(self._owner).__name__} does not generate; use trace() to call it")
        return self.trace(*args, **kwargs)

    def _generates(self) -> bool:
        return self._owner._pipeline_calls_generate and self._owner.model.can_generate()

    def _generates_tokens(self) -> bool:
        """Return whether the model generates token by token, with the `generate` of transformers or a similar one."""
        generate = getattr(self._owner.model, "generate", None)
        return self._generates() and "stopping_criteria" in inspect.signature(generate).parameters

    def _sizes(self, args: tuple, kwargs: Mapping[str, Any]) -> list[int]:
        """Return how many entries of the batch each input has, if the inputs form one batch."""
        given = args[0] if args else None
        size = kwargs.get("batch_size") or self._owner._batch_size or 1
        if not isinstance(given, list) or isinstance(self._owner, ChunkPipeline) or len(given) > size:
            return []
        return [1] * len(given)

    def _is_one_pass(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        """Return whether `postprocess` is called only after all calls of the model, not after those for each input."""
        several = (list, tuple, Dataset, GeneratorType)
        return bool(self._sizes(args, kwargs)) or not any(isinstance(one, several) for one in args or kwargs.values())


class PipelineTree(NamedTree):
    """The tree of a transformers pipeline: the parts and methods that can be tapped."""

    def __init__(self, root: Target) -> None:
        super().__init__(root)
        self._component_targets: dict[str, Target] = {}

    def parts(self) -> dict[str, Any]:
        """Return the parts of the pipeline by name, each part only once."""
        own, parts = vars(self.root.owner), {}
        for name, part in own.items():
            if isinstance(part, nn.Module) or (name in _PARTS and callable(part)):
                parts.setdefault(id(part), (name, part))
        return dict(parts.values())

    def children_of(self, target: Target) -> dict[str, Target]:
        if target.owner is not self.root.owner:
            return children_in(target)
        return part_targets(self.parts(), self._component_targets)

    def components(self) -> list[Target]:
        return [*self.method_targets().values(), *self.children_of(self.root).values()]

    def method_targets(self) -> dict[str, Target]:
        return {name: Target(self.root.owner, method, name) for name, method in _METHODS.items()}

    def methods_of(self, owner: Any) -> Mapping[str, str]:
        return {name: name for name in _METHODS if name != "forward"} if owner is self.root.owner else {}

    def target_named(self, outer: Target, name: str) -> Target | None:
        # `pipeline.forward` wraps `_forward`, which each pipeline class defines.
        if outer.owner is self.root.owner:
            return self.method_targets().get(name)
        return super().target_named(outer, name)

    def clock(self) -> Clock:
        return Clock([self.children_of(self.root)["model"]])

    def find_names(self, part: nn.Module) -> dict[str, str]:
        modules = [own for own in self.parts().values() if isinstance(own, nn.Module)]
        stacks = (stack for own in modules for stack in own.modules() if is_list(stack) and are_layers(stack))
        if any(part is layer for stack in stacks for layer in stack):
            return layer_names(part)
        if not isinstance(unwrapped(part), PreTrainedModel):
            return {}
        return model_names(part) if part.get_output_embeddings() is not None else standard_names(part)

    def describe(self, owner: Any) -> str:
        if owner is not self.root.owner:
            return super().describe(owner)
        shown = {name: repr(p) if isinstance(p, nn.Module) else type(p).__name__ for name, p in self.parts().items()}
        lines = [f"  ({name}): " + text.replace("\n", "\n  ") for name, text in shown.items()]
        methods = ", ".join(f"{name}()" for name in _METHODS)
        return "\n".join([f"{type(owner).__name__}(", *lines, ")", f"traceable besides modules: {methods}"])


def _opened(source: Any, arguments: dict[str, Any]) -> Pipeline:
    """Return the pipeline that a user names or passes."""
    if isinstance(source, Pipeline):
        if arguments:
            raise InputError(f"{', '.join(arguments)} cannot be used with a pipeline that is already loaded")
        return source
    if not isinstance(source, (str, Path)):
        raise InputError(
            f"HFPipeline takes transformers.pipeline(...), a task or a name, not {type(source).__name__}: "
            "HFPipeline(transformers.pipeline(task, model=model, tokenizer=tokenizer))"
        )
    arguments = with_dtypes(arguments)
    name, tasks = str(source), PIPELINE_REGISTRY.get_supported_tasks()
    is_task = name in tasks or "model" in arguments
    model = arguments.get("model") if is_task else name
    of_model = arguments.get("model_kwargs") or {}
    hint = "" if name in tasks else suggest(name, tasks)
    with explained(f"the pipeline {name!r} cannot be loaded{hint}"), cache_only_if_offline():
        if not _is_live(model):
            check_configurations(Path(model))
            check_weights(Path(model), of_model.get("subfolder", ""))
        if is_task:
            check_options_of_loading(name, arguments)
        with requiring_all_weights():
            given = UNTRUSTED | arguments | {"model_kwargs": {**of_model}}  # transformers changes this dictionary
            pipeline = transformers.pipeline(**{"task" if is_task else "model": name}, **given)
        if "gguf_file" not in of_model and not any(_is_live(arguments.get(name, "")) for name in _OF_TEXTS):
            _check_vocabularies(pipeline)
    check_options_of_opened(pipeline, arguments)
    dtype = arguments.get("dtype", arguments.get("torch_dtype"))
    if isinstance(dtype, torch.dtype) and all(weight.dtype != dtype for weight in pipeline.model.parameters()):
        raise InputError(f"dtype: the pipeline's model is in {pipeline.model.dtype} and cannot be opened in {dtype}")
    return pipeline


def _check_vocabularies(pipeline: Pipeline) -> None:
    """Raise OSError if the pipeline's tokenizer, or its processor's, was loaded from a folder without a vocabulary."""
    for name in _OF_TEXTS:
        part = getattr(pipeline, name)
        place = getattr(getattr(part, "tokenizer", part), "name_or_path", "")
        check_vocabulary(Path(place), part)


def _is_live(part: Any) -> bool:
    return not isinstance(part, (str, Path))


def _tokenizer(pipeline: Pipeline) -> Any:
    """Return the tokenizer of the pipeline, or None."""
    return pipeline.tokenizer or getattr(pipeline.processor, "tokenizer", None)


# ---- methods that a run changes


@contextmanager
def _changed_methods(pipeline: Pipeline, generates: bool, grad: bool) -> Iterator[None]:
    """Change methods for the duration of a run.

    If the model generates tokens, `generate` reports them. With `grad`, gradients are computed in the forward pass, and
    its result is detached for `postprocess`, which converts it to numbers."""
    changes: list[tuple[Any, str, Callable[[Callable], Callable]]] = []
    if generates or (grad and hasattr(pipeline.model, "generate")):
        changes.append((pipeline.model, "generate", partial(_reporting, pipeline)))
    if grad:
        changes.append((pipeline, "get_inference_context", lambda own: lambda: nullcontext))
        changes.append((pipeline, "forward", _detaching))
    with ExitStack() as ends:
        for owner, name, change in changes:
            ends.callback(ChangedMethod(owner, name, change).remove)
        yield


def _reporting(pipeline: Pipeline, generate: Callable) -> Callable:
    """Return a `generate` that reports its tokens to the run that calls it, and computes gradients if the run asks
    for them."""
    lifted = with_gradients(generate)

    def reporting(*args: Any, **kwargs: Any) -> Any:
        generated, grad = _generating.get()
        if generated is not None:
            given = {"inputs": args[0], **kwargs} if args else kwargs
            kwargs["stopping_criteria"] = generated.along_with(pipeline.model, given)
        drafting = _generating.set((None, grad))  # the model may call its own `generate`, to draft tokens
        try:
            return (lifted if grad else generate)(*args, **kwargs)
        finally:
            _generating.reset(drafting)

    return reporting


def _detaching(forward: Callable) -> Callable:
    """Return a `forward` whose results have no gradients."""
    return lambda inputs, **more: tree_map(_detached, forward(inputs, **more))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
