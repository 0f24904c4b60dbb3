"""`TransformersModel(name, task=...)`, nnsight's wrapper for models of transformers with any task.

model = TransformersModel("openai-community/gpt2", task="text-generation")
model = TransformersModel("google/vit-base-patch16-224", task="image-classification")
with model.trace(image) as tracer:
    logits = model.output.logits.save()
with model.pipe(image) as tracer:
    labels = tracer.result.save()
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property, partial
from importlib import import_module
from typing import Any

from torch import nn

from diffsight.compat.tracer import describe_opening
from diffsight.errors import InputError
from diffsight.extending import Run, owner_of

_OF_TOKENIZER = ("truncation", "max_length", "padding", "add_special_tokens")
_IMAGES_AND_TEXT = "image-text-to-text"
_SUFFIXES = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForQuestionAnswering": "question-answering",
    "Model": "feature-extraction",
}


class TransformersNames:
    """The arguments and attributes of nnsight's `TransformersModel`.

    Attributes:
        task: A task of transformers' pipelines. It determines the class of the model and the pipeline that `pipe` runs.
        tokenizer, processor, image_processor, feature_extractor: The preprocessors of the model; None if it has none.
    """

    _task: str | None = None

    def __new__(cls, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        is_named = task == _IMAGES_AND_TEXT and cls._task is None
        sees = import_module("diffsight.compat.wrappers").vision_transformers_model() if is_named else cls
        return object.__new__(sees if issubclass(sees, cls) else cls)

    def __init__(
        self,
        source: Any,
        tokenizer: Any = None,
        *,
        task: str | None = None,
        automodel: Any = None,
        processor: Any = None,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        transformers = import_module("transformers")
        task = task or self._task
        if isinstance(source, str):
            config = _with_class(transformers, source, automodel, task, kwargs)
            kwargs |= {} if config is None else {"config": config}
        elif automodel is not None:
            raise InputError("automodel= chooses the class to load, but a live model is already loaded: omit it")
        if task == _IMAGES_AND_TEXT:
            given = processor if tokenizer is None else tokenizer
            super().__init__(source, *([] if given is None else [given]), **kwargs)
        else:
            super().__init__(source, *([] if tokenizer is None else [tokenizer]), **kwargs)
            self.__dict__["processor"] = processor
        self.__dict__.update(task=task or _task_of(self._owner), feature_extractor=feature_extractor)
        self.__dict__["image_processor"] = image_processor or _image_processor(transformers, source, self)
        self._set_up_tokenizer(tokenizer_kwargs or {})

    def _set_up_tokenizer(self, settings: Mapping[str, Any]) -> None:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return
        if getattr(tokenizer, "pad_token", "") is None:  # user code calls the tokenizer with padding=True
            tokenizer.pad_token = tokenizer.eos_token
        if self._pads_left():
            tokenizer.padding_side = "left"
        for name, value in settings.items():
            setattr(tokenizer, name, value)

    @cached_property
    def pipeline(self) -> Any:
        """The transformers pipeline for the model's task."""
        parts = {
            name: part
            for name in ("tokenizer", "processor", "image_processor", "feature_extractor")
            if (part := self.__dict__.get(name)) is not None
        }
        return import_module("transformers").pipeline(self.task, model=self.module, **parts)

    def pipe(self, *args: Any, **kwargs: Any) -> Run:
        """Open a run of the pipeline, from its input to its result: texts, labels and so on."""
        again = None if args else partial(self.pipe, **kwargs)
        return describe_opening(self._new_run(lambda: self.pipeline(*args, **kwargs), (), again), True, bool(args))

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """Open a run of one forward pass. With `trace=False`, return its result."""
        args, kwargs = self._given(args, kwargs, _OF_TOKENIZER)
        return super().trace(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Open a run that generates. With `trace=False`, return its result."""
        args, kwargs = self._given(args, kwargs, [name for name in _OF_TOKENIZER if name != "max_length"])
        return super().generate(*args, **kwargs)

    def _given(self, args: tuple, kwargs: dict[str, Any], settings_of: Sequence[str]) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments, with texts tokenized if tokenizer settings are passed, and images preprocessed."""
        nested = [kwargs.pop(name, None) or {} for name in ("invoker_args", "generate_kwargs")]
        kwargs = {**nested[0], **nested[1], **kwargs}
        if args and isinstance(args[0], Mapping) and "text" in args[0]:  # the input of a pipeline, by name
            args, kwargs = args[1:], {**args[0], **kwargs}
        if "text" in kwargs and not args:
            args = (kwargs.pop("text"),)
        settings = {name: kwargs.pop(name) for name in settings_of if name in kwargs and self._are_texts(args)}
        if settings:
            texts = [args[0]] if isinstance(args[0], str) else args[0]
            settings.setdefault("padding", len(texts) > 1)
            args = (dict(self.tokenizer(texts, return_tensors="pt", **settings)), *args[1:])
        elif args and self.image_processor is not None and _is_image(args[0]):
            args = (dict(self.image_processor(args[0], return_tensors="pt")), *args[1:])
        return args, kwargs

    def _are_texts(self, args: tuple) -> bool:
        given = args[0] if args else None
        is_text = isinstance(given, str) or (isinstance(given, list) and all(isinstance(text, str) for text in given))
        return is_text and self.tokenizer is not None


def _with_class(transformers: Any, source: str, automodel: Any, task: str | None, kwargs: Mapping[str, Any]) -> Any:
    """Return the configuration of a model, with the class that `automodel` or the task requires; None if the model can
    be loaded as the class it was saved as."""
    if automodel is None and task in (None, "text-generation", _IMAGES_AND_TEXT):
        return kwargs.get("config")
    automodel = getattr(transformers, automodel) if isinstance(automodel, str) else automodel
    kinds = (automodel,) if automodel else transformers.pipelines.PIPELINE_REGISTRY.check_task(task)[1]["pt"]
    hub = {n: kwargs[n] for n in ("revision", "token", "cache_dir") if n in kwargs}
    hub["trust_remote_code"] = kwargs.get("trust_remote_code", False)  # without it, transformers asks at the terminal
    config = deepcopy(kwargs.get("config")) or transformers.AutoConfig.from_pretrained(source, **hub)
    if config.architectures and config.architectures[0] in {kind.__name__ for kind in kinds}:
        return config
    fitting = [
        kind._model_mapping[type(config)] for kind in kinds if type(config) in getattr(kind, "_model_mapping", ())
    ]
    names = [cls.__name__ for kind in fitting for cls in (kind if isinstance(kind, tuple) else (kind,))]
    names += [kind.__name__ for kind in kinds if not hasattr(kind, "_model_mapping")]  # not an auto class
    if not names:
        what = getattr(automodel, "__name__", None) or task
        raise InputError(
            f"{source} cannot be loaded for {what!r}: there is no such model for a {type(config).__name__}"
        )
    if not set(names).intersection(config.architectures or ()):
        config.architectures = names[:1]
    return config


def _task_of(net: nn.Module) -> str:
    """Return the task of a model, by its class."""
    if getattr(net, "can_generate", lambda: False)():
        return "text-generation"
    return next(
        (task for suffix, task in _SUFFIXES.items() if type(net).__name__.endswith(suffix)), "feature-extraction"
    )


def _image_processor(transformers: Any, source: Any, model: Any) -> Any:
    """Return the image processor: the one in the model's processor or, for a model that takes only images, its own."""
    own = getattr(model.__dict__.get("processor"), "image_processor", None)
    if (
        own is not None
        or not isinstance(source, str)
        or getattr(owner_of(model), "main_input_name", "") != "pixel_values"
    ):
        return own
    try:
        return transformers.AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None


def _is_image(value: Any) -> bool:
    return hasattr(value, "getpixel") or (isinstance(value, list) and bool(value) and all(map(_is_image, value)))
