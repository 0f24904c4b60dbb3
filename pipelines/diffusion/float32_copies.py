"""Copies in float32 of modules that overflow in float16, such as the autoencoder of Stable Diffusion XL.

vae = in_float32(pipeline.vae, execution_device(pipeline))
"""

import torch
from accelerate.utils import align_module_device
from torch import nn

from diffsight.extending import structural_copy, unwrapped


def in_float32(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a module on a device in float32, without hooks.

    Casting the module itself would change it in other threads, and in an open run that waits inside it. Weights that
    accelerate has offloaded are loaded one module at a time."""
    module = unwrapped(module)
    copied = structural_copy(module, with_weights=True)
    for own, part in zip(module.modules(), copied.modules(), strict=True):
        with align_module_device(own):
            for name, tensor in own.named_parameters(recurse=False, remove_duplicate=False):
                part.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
            for name, tensor in own.named_buffers(recurse=False, remove_duplicate=False):
                part.register_buffer(name, tensor.clone())
    return copied.to(device, torch.float32)
