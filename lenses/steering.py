"""Steering: add a direction to hidden states, or remove it from them, in everything that a model does.

    direction = happy.mean(0) - sad.mean(0)                 # from collect_activations(...), (features,)
    cheerful = steer(model, [10, 11, 12], direction, factor=4)
    cheerful.generate("I think that", max_new_tokens=20).text

    red = steering_vector(pipeline, red_prompts, other_prompts, layers="unet.**.attn2", num_inference_steps=20)
    redder = steer(pipeline, vector=red, factor=10, keep_norm=True)
    redder.generate("a circle", seed=0, num_inference_steps=20).images

With x a hidden state, v the vector, f the factor and u = v / |v|, x becomes

    x + f v                 mode="add"
    x - f (x · u) u         mode="remove": f = 1 removes the direction, f = 2 reflects x

Within a single run of a language model, use `run.steer(layers, direction)`.
"""

from typing import TypeVar

import torch

from diffsight.lenses.denoising.call_checks import Steps
from diffsight.lenses.layers import Layers
from diffsight.lenses.steering_vector import SteeringVectors
from diffsight.lenses.visits.steered import Positions, find_steering
from diffsight.lenses.visits.visiting import visiting
from diffsight.pipelines.steering_arguments import check_factor

Wrapper = TypeVar("Wrapper")


def steer(
    model: Wrapper,
    layers: Layers = None,
    vector: torch.Tensor | SteeringVectors | None = None,
    factor: float = 1.0,
    positions: Positions = None,
    *,
    mode: str = "add",
    steps: Steps = None,
    branch: str | None = None,
    keep_norm: bool = False,
) -> Wrapper:
    """Return a copy of the model, sharing its weights, that is steered in every run.

        steer(model, 15, direction, factor=4)
        steer(model, [10, 11], direction, mode="remove")
        steer(pipeline, "unet.mid_block", direction, factor=20, steps=slice(0, 10))
        steer(pipeline, vector=vectors, factor=10, keep_norm=True)              # at the points of the vectors

    A generation that ends before it reaches an integer in `steps`, or any token of a slice, issues a warning. A run
    without guidance cannot be steered in its unconditional branch, which is an error.

    A copy can be steered again. `cheerful.clear_edits()` removes every edit and attached module from it.

    Args:
        model: The model.
        layers: Where to steer. In a language model: layer i is the output of `layers[i]`, -1 the last, and "embedding"
            the input of the first. In any model: paths or patterns of modules, such as "layers[3].mlp",
            "unet.**.attn2" or "unet.mid_block.input". Default: the points of the vectors, or all layers of a language
            model.
        vector: The direction, (features,), or the result of `steering_vector`, which has a direction for each point.
        factor: Multiplies the direction; with "remove", the component along it.
        positions: In a language model, positions in each prompt: 0 is its first token, -1 its last. Elsewhere,
            positions in the sequence, or in a feature map row by row; or a mask over the image, (rows, columns), for
            feature maps and attention modules. Default: all, including generated tokens.
        mode: "add" the direction, or "remove" it.
        steps: The denoising steps, or the generated tokens, in which to steer. The prompt is token 0. Default: all.
        branch: The branch of guidance to steer: "cond", "uncond" or "both". Default: "cond".
        keep_norm: Whether each hidden state keeps its length.

    Returns:
        The steered copy.

    Raises:
        InputError: A layer does not exist, the vector does not have as many features as a hidden state, or another
            argument is not valid.
        PointNotFoundError: A path does not exist.
    """
    steering = find_steering(model, layers, vector, check_factor(factor), positions, mode, steps, keep_norm)
    return visiting(model, steering.points, steering.change, branch, steering.step_check(), required=True)
