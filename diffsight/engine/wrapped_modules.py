"""See through modules that wrap another: those of `torch.compile`, data parallelism, sharding and PEFT.

    unwrapped(torch.compile(unet))              # unet
    wrapped_path(torch.compile(unet))           # "_orig_mod"
    wrapped_path(PeftModel(net, config))        # "base_model.model"

A part that is wrapped keeps its names, its arguments and its place in a pipeline.
"""

from torch import nn

from diffsight.engine.target import Target

_INSIDE = {  # the name of a class: the name of the wrapped module in it
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "PeftModel": "base_model",
    "BaseTuner": "model",
}


def wrapped_path(module: nn.Module) -> str:
    """Return the path of the module that a module wraps; an empty string if it wraps none."""
    path = []
    while (name := _wrapped_name(module)) is not None:
        path.append(name)
        module = module._modules[name]
    return ".".join(path)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that a module wraps, or the module itself."""
    while (name := _wrapped_name(module)) is not None:
        module = module._modules[name]
    return module


def children_in(target: Target) -> dict[str, Target]:
    """Return the parts directly in a part of a model, by name, including those of the module that it wraps."""
    children, wrapped = target.named_children(), wrapped_targets(target)
    return {**wrapped[-1].named_children(), **children} if wrapped else children


def wrapped_targets(target: Target) -> list[Target]:
    """Return the targets of the modules that a part wraps, from the outermost to the innermost."""
    found, inner = [], target
    while (name := _wrapped_name(inner.owner)) is not None:
        inner = inner.children()[name]
        found.append(inner)
    return found


def _wrapped_name(module: object) -> str | None:
    if not isinstance(module, nn.Module):
        return None
    names = (_INSIDE.get(cls.__name__) for cls in type(module).__mro__)
    return next((name for name in names if name is not None and module._modules.get(name) is not None), None)
