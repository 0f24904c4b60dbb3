"""The output that a denoiser would have if it ended at one of its blocks, for all blocks in one call.

The later blocks add nothing. In a transformer they are left out: the image tokens of the block go straight into the
final norm and projection. In a UNet they keep only their shortcuts: residual blocks and attentions add nothing to their
input, and the convolutions that change channels or resolution stay. At the last block, the result is the denoiser's own
output.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from diffsight.errors import InputError
from diffsight.pipelines.diffusion.single_module import as_model

_UNET_PARTS = {"resnets", "attentions", "downsamplers", "upsamplers"}


def exit_outputs(denoiser: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the output that the denoiser would have at each of its blocks, by the path of the block.

    Args:
        denoiser: The denoiser.
        args: The positional arguments of one call, with a batch of one.
        kwargs: The keyword arguments of the call.

    Raises:
        InputError: The denoiser is neither a UNet of residual blocks and attentions nor a transformer whose blocks pass
            on the image tokens.
    """
    blocks = block_names(denoiser)
    model = as_model(denoiser)
    with torch.no_grad():
        exits = _exits_of_unet if _is_unet(denoiser) else _exits_of_transformer
        found = exits(model, blocks, args, dict(kwargs))
        expected = _tensors(model.trace(*args, **kwargs).result)[0]
    if not torch.allclose(found[-1:].float(), expected.float(), rtol=1e-2, atol=1e-2 * expected.abs().max().item()):
        raise InputError(f"{_cannot(denoiser)}: its blocks do not lie one after another")
    return dict(zip(blocks, found.split(1)))


def block_names(denoiser: nn.Module) -> list[str]:
    """Return the paths of the blocks of a denoiser, in the order in which they run.

    Raises:
        InputError: The denoiser has no blocks of a known kind.
    """
    if _is_unet(denoiser):
        sides = {
            side: [f"{side}.{i}" for i in range(len(getattr(denoiser, side)))] for side in ("down_blocks", "up_blocks")
        }
        middle = ["mid_block"] if denoiser.mid_block is not None else []
        names = [*sides["down_blocks"], *middle, *sides["up_blocks"]]
        for name in names:
            lists = {key for key, part in denoiser.get_submodule(name).named_children() if len(list(part.parameters()))}
            if not lists <= _UNET_PARTS:
                raise InputError(f"{_cannot(denoiser)}: {name} also has {', '.join(sorted(lists - _UNET_PARTS))}")
        return names
    lists = {name: part for name, part in denoiser.named_children() if name.endswith(("blocks", "layers"))}
    names = [f"{name}.{i}" for name, part in lists.items() if isinstance(part, nn.ModuleList) for i in range(len(part))]
    if not names:
        raise InputError(f"{_cannot(denoiser)}: it has no blocks of a known kind")
    return names


def _is_unet(denoiser: nn.Module) -> bool:
    return all(hasattr(denoiser, name) for name in ("down_blocks", "mid_block", "up_blocks"))


def _cannot(denoiser: nn.Module) -> str:
    return f"the exits of the blocks of {type(denoiser).__name__} cannot be drawn"


# ---- UNets


def _exits_of_unet(model: Any, blocks: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """Row i is the exit at block i: all later blocks add nothing to it."""
    args, kwargs = _repeated((args, kwargs), len(blocks))
    with model.trace(*args, **kwargs) as run:
        for rows, name in enumerate(blocks):
            for kind, part in _residual_parts(run[name]):
                if kind == "resnets":
                    part.conv2.output[:rows] = 0
                else:
                    _first(part.output)[:rows] = part.input[:rows]
    return _tensors(run.result)[0]


def _residual_parts(block: Any) -> Iterator[tuple[str, Any]]:
    """Yield the residual blocks and attentions of a block as they run. A middle block begins with a residual block."""
    resnets, attentions = list(block.resnets), list(getattr(block, "attentions", None) or ())
    if len(resnets) > len(attentions) > 0:
        yield "resnets", resnets.pop(0)
        order = ("attentions", "resnets")
    else:
        order = ("resnets", "attentions")
    parts = {"resnets": resnets, "attentions": attentions}
    for i in range(max(map(len, parts.values()))):
        for kind in order:
            if i < len(parts[kind]):
                yield kind, parts[kind][i]


# ---- transformers


def _exits_of_transformer(model: Any, blocks: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """Row i is the exit at block i. All blocks are skipped, and the last returns the tokens of all exits."""
    with model.trace(*args, **kwargs) as run:
        following = [name for name, _ in model.module.named_children() if "norm" in name and "out" in name]
        outputs = [run[name].output for name in blocks]
        given = run[following[0]].input if following else None
        run.stop()
    place = _place_of_image_tokens(model.module, outputs[-1], given)
    states = [_tensors(output, keep_none=True)[place] for output in outputs]
    if len({state.shape for state in states}) > 1:
        raise InputError(f"{_cannot(model.module)}: its blocks return image tokens of different shapes")
    args, kwargs = _repeated((args, kwargs), len(blocks))
    with model.trace(*args, **kwargs) as run:
        for name, output in zip(blocks[:-1], outputs):
            run[name].skip(_repeated(output, len(blocks)))
        run[blocks[-1]].skip(_with_tensor(_repeated(outputs[-1], len(blocks)), place, torch.cat(states)))
    return _tensors(run.result)[0]


def _place_of_image_tokens(denoiser: nn.Module, output: Any, given: Any) -> int:
    """Return the index of the image tokens in the output of the last block: they go into the final norm."""
    places = [i for i, value in enumerate(_tensors(output, keep_none=True)) if isinstance(value, torch.Tensor)]
    if len(places) == 1:
        return places[0]
    tensors = _tensors(output, keep_none=True)
    places = [i for i in places if isinstance(given, torch.Tensor) and torch.equal(tensors[i], given)] if places else []
    if len(places) != 1:
        raise InputError(
            f"{_cannot(denoiser)}: its last block returns several tensors, and none goes into a final norm"
        )
    return places[0]


# ---- values


def _repeated(value: Any, times: int) -> Any:
    """Return a value with `times` rows in every tensor that has one row."""

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat_interleave(times, 0) if tensor.ndim and len(tensor) == 1 else tensor

    return tree_map_only(torch.Tensor, repeat, value)


def _first(output: Any) -> torch.Tensor:
    return _tensors(output)[0]


def _tensors(output: Any, keep_none: bool = False) -> list[Any]:
    """Return the items of a module's output as a list."""
    if isinstance(output, torch.Tensor):
        return [output]
    items = list(output.values()) if isinstance(output, Mapping) else list(output)
    return items if keep_none else [item for item in items if isinstance(item, torch.Tensor)]


def _with_tensor(output: Any, place: int, tensor: torch.Tensor) -> Any:
    """Return a module's output with another tensor in one place."""
    if isinstance(output, torch.Tensor):
        return tensor
    return (*output[:place], tensor, *output[place + 1 :])
