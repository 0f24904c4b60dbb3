"""The files of sparse autoencoders in the format of SAELens, which is also ours. `other_sae_files` reads others.

cfg.json                    the architecture, the sizes, and in `metadata` the point
sae_weights.safetensors     W_enc, b_enc, W_dec, b_dec, threshold
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffsight.errors import InputError
from diffsight.lenses.features.other_sae_files import OTHERS, checked, read_json
from diffsight.lenses.results.saving import save_files
from diffsight.pipelines.hub_access import hub_access

_PACKAGED = Path(__file__).parent / "packaged"
_NAMES = {"W_enc": "encoder", "b_enc": "encoder_bias", "W_dec": "decoder", "b_dec": "decoder_bias"}
_ARCHITECTURES = {"topk": "topk", "relu": "standard", "jumprelu": "jumprelu", "batch_topk": "jumprelu"}


def write_sae(sae: Any, folder: str | Path) -> list[Path]:
    """Write an SAE as SAELens does, and return the paths."""
    state = {name: getattr(sae, own).detach().cpu().contiguous() for name, own in _NAMES.items()}
    if hasattr(sae, "threshold"):
        state["threshold"] = sae.threshold.detach().cpu().expand(sae.count).contiguous()
    facts = {"point": sae.point, "of": sae.of, "kind": sae.kind, **sae.facts}
    config = {
        "architecture": _ARCHITECTURES[sae.kind],
        "d_in": sae.width,
        "d_sae": sae.count,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": sae.point, "diffsight": facts},
    }
    if sae.kind == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    text = json.dumps(config, indent=2, default=repr) + "\n"
    return save_files(
        folder,
        {
            "cfg.json": lambda path: path.write_text(text, encoding="utf-8"),
            "sae_weights.safetensors": partial(save_file, state),
        },
    )


def read_sae(source: str | Path, subfolder: str | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the arguments and the state of the SAE in a folder, a packaged name or a hub id."""
    folder = _folder(source, subfolder)
    try:
        for file, read in OTHERS.items():
            if (folder / file).is_file():
                return checked(*read(folder))
        if (folder / "cfg.json").is_file():
            return checked(*_of_saelens(read_json(folder / "cfg.json"), load_file(folder / "sae_weights.safetensors")))
    except InputError:
        raise
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the SAE in {folder} cannot be read: {type(error).__name__}: {error}") from error
    raise InputError(f"{folder} has no SAE: there is neither cfg.json nor {' nor '.join(OTHERS)} in it")


def _folder(source: str | Path, subfolder: str | None) -> Path:
    if not isinstance(source, (str, Path)):
        raise InputError(f"an SAE is loaded from a folder, a packaged name or a hub id, not {source!r}")
    folder = Path(source).expanduser()
    packaged = _PACKAGED / str(source).removeprefix("diffsight/")
    if str(source).startswith("diffsight/"):
        if not packaged.is_dir():
            known = ", ".join(sorted(f"diffsight/{path.name}" for path in _PACKAGED.glob("*")))
            raise InputError(f"no packaged SAE is called {source}: there are {known}")
        folder = packaged
    elif folder.is_file():
        raise InputError(f"{source} is a file: pass the folder of an SAE, with cfg.json and sae_weights.safetensors")
    elif not folder.is_dir():
        allowed = f"{subfolder}/*" if subfolder else None
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=allowed, **hub_access()))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise InputError(f"{source} is neither a folder nor an SAE on the hub: {error}") from None
    return folder / subfolder if subfolder else folder


def _of_saelens(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
    architecture = config.get("architecture", "standard")
    kinds = {"topk": "topk", "standard": "relu", "jumprelu": "jumprelu"}
    if architecture not in kinds:
        raise InputError(f"SAEs of the architecture {architecture!r} are not supported: {', '.join(kinds)} are")
    for option, plain in {"normalize_activations": "none", "reshape_activations": "none"}.items():
        if config.get(option, plain) not in (plain, None):
            raise InputError(f"SAEs with {option}={config[option]!r} are not supported: fold it into the weights first")
    if config.get("rescale_acts_by_decoder_norm"):
        raise InputError("SAEs with rescale_acts_by_decoder_norm are not supported: fold it into the weights first")
    metadata = config.get("metadata") or {}
    own = dict(metadata.get("diffsight") or {})
    own.pop("kind", None)
    point = own.pop("point", None) or metadata.get("hook_name") or config.get("hook_name")
    arguments = {"point": point, "of": own.pop("of", "output"), "facts": own, "kind": kinds[architecture]}
    state = {own_name: tensors[name].float() for name, own_name in _NAMES.items()}
    if arguments["kind"] == "jumprelu":
        state["threshold"] = tensors["threshold"].float()
    if not config.get("apply_b_dec_to_input", True):
        state["encoder_bias"] = state["encoder_bias"] + state["decoder_bias"] @ state["encoder"]
    return arguments | {"k": config.get("k")}, state
