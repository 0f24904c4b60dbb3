"""The argument `inverted`: run a lens that draws from noise on an image whose noise `invert` has found.

    inverted = invert(model, image, "a red circle", num_inference_steps=20)
    trajectory_lens(model, inverted=inverted)
    prompt_to_prompt(model, "a red circle", "a green circle", inverted=inverted)

The lens is called with the arguments of `inverted`, including its noise and seed. Arguments passed to the lens, such as
another prompt or guidance, replace them.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from diffsight.errors import InputError
from diffsight.lenses.denoising.inverse_schedulers import inverse_of
from diffsight.lenses.results.model_records import fingerprint
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.remote import is_on_server

if TYPE_CHECKING:
    from diffsight.lenses.inversion import Inversion

_R = TypeVar("_R")
_NOISE = ("seed", "latents", "generator")  # an inverted image has its own
_PATH = ("height", "width", "num_inference_steps", "timesteps", "sigmas")  # only these lead from the noise to the image


def takes_inverted(lens: Callable[..., _R]) -> Callable[..., _R]:
    """Let a lens take `inverted=`.

    The result records the arguments that the lens is called with, so that it can be reproduced without the inversion.
    """
    signature = inspect.signature(lens)

    @wraps(lens)
    def on_inverted(*args: Any, inverted: "Inversion | None" = None, **kwargs: Any) -> _R:
        if inverted is None:
            return lens(*args, **kwargs)
        given = signature.bind_partial(*args, **kwargs).arguments
        model = _checked(lens.__name__, given.pop("model", None), inverted)
        given = dict(given) | given.get("arguments", {})
        _check_arguments(given, inverted)
        filled = {name: value for name, value in inverted.arguments.items() if name not in given}
        if "prompt" not in signature.parameters:
            filled.pop("prompt", None)
        args, kwargs = (model, *args[1:]), {name: value for name, value in kwargs.items() if name != "model"}
        return lens(*args, **filled, **kwargs)

    own = inspect.Parameter("inverted", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Inversion | None")
    *others, arguments = signature.parameters.values()
    on_inverted.__signature__ = signature.replace(parameters=[*others, own, arguments])
    return on_inverted


def _checked(lens: str, model: Any, inverted: Any) -> DiffusionModel:
    """Return the model that draws an inverted image, with the controller of the inversion if it has one."""
    from diffsight.lenses.inversion import Inversion  # with matplotlib, which most runs do not need

    if not isinstance(inverted, Inversion):
        raise InputError(f"{lens}: inverted must be what invert returns, not {type(inverted).__name__}")
    if not isinstance(model, DiffusionModel):
        raise InputError(f"{lens}: inverted is for pipelines: omit it with {type(model).__name__}")
    if inverted.model != model.source or _has_other_weights(model, inverted):
        same = "" if inverted.model != model.source else " with other weights"
        raise InputError(
            f"{lens}: the image was inverted by {inverted.model}{same}, and its noise leads to another image in "
            f"{model.source}: invert it with this model"
        )
    scheduler = type(inverse_of(model.pipeline.scheduler, inverted.fixed_point)).__name__
    if scheduler != inverted.scheduler:
        raise InputError(
            f"{lens}: the image was inverted with {inverted.scheduler}, but the pipeline now has "
            f"{type(model.pipeline.scheduler).__name__}: invert it with this scheduler"
        )
    return model.edit(inverted.draw_to_image) if inverted.eta else model


def _has_other_weights(model: DiffusionModel, inverted: "Inversion") -> bool:
    """Return whether an image was inverted with other weights, as far as both are known: those on a server are not."""
    known = None if inverted.call is None else inverted.call.models.get("model")
    if known is None or is_on_server(model) != ("remote" in known.options):
        return False
    return known.weights != fingerprint(model)


def _check_arguments(given: Mapping[str, Any], inverted: "Inversion") -> None:
    """Raise InputError for an argument with which the noise does not lead to the image."""
    for name in _NOISE:
        if given.get(name) is not None:
            raise InputError(f"an inverted image has its own noise: omit {name}")
    for name in _PATH:
        own = inverted.arguments.get(name)
        if given.get(name) is not None and str(given[name]) != str(own):
            found = f"its default {name}" if own is None else f"{name}={own}"
            raise InputError(f"the image was inverted with {found}, not with {name}={given[name]!r}: omit {name}")
