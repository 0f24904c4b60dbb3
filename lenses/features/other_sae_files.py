"""Read the sparse autoencoders of other projects.

    config.json, ae.pt              dictionary_learning: encoder.weight, decoder.weight, ...
    config.json, state_dict.pth     sdxl-unbox: latent_bias, pre_bias, encoder.weight, decoder.weight
    cfg.json, sae.safetensors       SAeUron, sparsify: encoder.weight, encoder.bias, W_dec, b_dec

PyTorch files are read with `weights_only=True`, which does not execute code. Every reader returns the arguments and
the state of an `SAE` with the same features and the same reconstruction.
"""

import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffsight.errors import InputError

State = Mapping[str, torch.Tensor]


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def checked(arguments: dict[str, Any], state: State) -> tuple[dict[str, Any], State]:
    """Return the arguments with the sizes, and the state. Raise InputError if its shapes do not fit."""
    width, features = state["encoder"].shape
    shapes = {"encoder_bias": (features,), "decoder": (features, width), "decoder_bias": (width,)}
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise InputError(f"the SAE is damaged: {name} has the shape {tuple(state[name].shape)}, not {shape}")
    own = {"width": width, "features": features, **arguments}
    return own, {name: tensor.float().contiguous() for name, tensor in state.items()}


def _torch_file(path: Path) -> State:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, and reading it could execute code, so it is not read. Convert it where "
            f"you trust it: torch.save(torch.load({path.name!r}, weights_only=False).state_dict(), {path.name!r})"
        ) from error


def _of_dictionary_learning(folder: Path) -> tuple[dict[str, Any], State]:
    config, tensors = read_json(folder / "config.json"), _torch_file(folder / "ae.pt")
    trainer = config.get("trainer", config)
    name = trainer.get("dict_class", "AutoEncoder")
    if name not in _DICTIONARIES:
        raise InputError(
            f"SAEs of the class {name} of dictionary_learning are not supported: {', '.join(_DICTIONARIES)} are"
        )
    arguments, state = _DICTIONARIES[name](tensors)
    place = trainer.get("submodule_name")
    layer = re.fullmatch(r"resid_post_layer_(\d+)", place or "")
    return {"k": None, "point": f"layers[{layer[1]}]" if layer else place, **arguments}, state


def _linear(tensors: State, decoder_bias: str) -> dict[str, torch.Tensor]:
    """Return the state of an SAE whose encoder and decoder are linear layers."""
    return {
        "encoder": tensors["encoder.weight"].T,
        "encoder_bias": tensors["encoder.bias"],
        "decoder": tensors["decoder.weight"].T,
        "decoder_bias": tensors[decoder_bias],
    }


def _with_input_bias(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state of an SAE that does not subtract its decoder bias, converted to an SAE that does."""
    return {**state, "encoder_bias": state["encoder_bias"] + state["decoder_bias"] @ state["encoder"]}


def _top_k(tensors: State) -> tuple[dict[str, Any], State]:
    return {"kind": "topk", "k": int(tensors["k"])}, _linear(tensors, "b_dec")


def _batch_top_k(tensors: State) -> tuple[dict[str, Any], State]:
    state = _linear(tensors, "b_dec")
    return {"kind": "jumprelu"}, {**state, "threshold": tensors["threshold"].expand(len(state["encoder_bias"]))}


def _relu(tensors: State) -> tuple[dict[str, Any], State]:
    return {"kind": "relu"}, _linear(tensors, "bias")


def _relu_without_input_bias(tensors: State) -> tuple[dict[str, Any], State]:
    """Features are in units of the length of their direction, so the directions are scaled to length one."""
    return {"kind": "relu"}, _scaled(_with_input_bias(_linear(tensors, "decoder.bias")))


def _jump_relu(tensors: State) -> tuple[dict[str, Any], State]:
    """The directions are scaled to length one, as above."""
    names = {"encoder": "W_enc", "encoder_bias": "b_enc", "decoder": "W_dec", "decoder_bias": "b_dec"}
    state = _with_input_bias({name: tensors[other] for name, other in names.items()})
    return {"kind": "jumprelu"}, _scaled({**state, "threshold": tensors["threshold"]})


def _scaled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state with directions of length one, and features multiplied by the former lengths."""
    length = state["decoder"].norm(dim=1)
    of_features = {name: state[name] * length for name in ("encoder", "encoder_bias", "threshold") if name in state}
    return {**state, **of_features, "decoder": state["decoder"] / length[:, None]}


_DICTIONARIES: dict[str, Callable[[State], tuple[dict[str, Any], State]]] = {
    "AutoEncoder": _relu,
    "AutoEncoderNew": _relu_without_input_bias,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "JumpReluAutoEncoder": _jump_relu,
}


def _of_unbox(folder: Path) -> tuple[dict[str, Any], State]:
    config, tensors = read_json(folder / "config.json"), _torch_file(folder / "state_dict.pth")
    tensors = tensors.get("state_dict", tensors)
    state = {
        "encoder": tensors["encoder.weight"].T,
        "encoder_bias": tensors["latent_bias"],
        "decoder": tensors["decoder.weight"].T,
        "decoder_bias": tensors["pre_bias"],
    }
    return {"kind": "topk", "k": int(config["k"]), "of": "difference"}, state


def _of_saeuron(folder: Path) -> tuple[dict[str, Any], State]:
    """Read an SAE of SAeUron. It is applied with `k` features for each position, however it was trained."""
    config, tensors = read_json(folder / "cfg.json"), load_file(folder / "sae.safetensors")
    plain = {"input_unit_norm": False, "transcode": False, "skip_connection": False, "activation": "topk"}
    for option, value in plain.items():
        if config.get(option, value) != value:
            raise InputError(f"SAEs with {option}={config[option]!r} are not supported")
    state = {
        "encoder": tensors["encoder.weight"].T,
        "encoder_bias": tensors["encoder.bias"],
        "decoder": tensors["W_dec"],
        "decoder_bias": tensors["b_dec"],
    }
    return {"kind": "topk", "k": int(config["k"])}, state


OTHERS: dict[str, Callable[[Path], tuple[dict[str, Any], State]]] = {
    "sae.safetensors": _of_saeuron,
    "ae.pt": _of_dictionary_learning,
    "state_dict.pth": _of_unbox,
}
"""The readers of other projects' folders, by the file that identifies the project."""
