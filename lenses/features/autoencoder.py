"""A sparse autoencoder: a vector as a sum of few directions out of many.

    features = relu-like((x - decoder_bias) @ encoder + encoder_bias)
    x ~ features @ decoder + decoder_bias

Every row of the decoder is a direction of length one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsight.errors import InputError, suggest
from diffsight.lenses.features.sae_files import read_sae, write_sae
from diffsight.lenses.features.sparsity import KINDS, above, batch_topk_, topk_
from diffsight.pipelines.argument_types import fits


def check_sizes(features: Any, kind: Any, k: Any, of: Any) -> None:
    """Raise InputError if there is no SAE with these arguments, see `SAE`."""
    if not fits(features, int) or features < 1:
        raise InputError(f"features is a number of features, 1 or more, not {features!r}")
    if kind not in KINDS:
        raise InputError(f"{kind!r} is not a kind of SAE{suggest(str(kind), KINDS)}: choose from {', '.join(KINDS)}")
    if kind in ("topk", "batch_topk") and (not fits(k, int) or not 1 <= k <= features):
        raise InputError(f"k must be from 1 to {features}, the number of features, not {k!r}")
    if of not in ("output", "difference"):
        raise InputError(f'of must be "output" or "difference", not {of!r}')


class SAE(nn.Module):
    """A sparse autoencoder.

        sae = SAE.load("diffsight/shapes-clip-unet")    # packaged, a folder, or a hub id
        features = sae.encode(x)                        # (..., features), most of them 0
        sae.decode(features)                            # close to x

    Args:
        width: The number of dimensions of a vector.
        features: The number of features.
        kind: How the active features are chosen: "topk", "batch_topk", "jumprelu" or "relu", see `sparsity.py`.
        k: The number of active features, for "topk" and "batch_topk".
        point: Where the vectors come from, such as "unet.mid_block".
        of: "output" of the point, or its "difference": output minus input.
        facts: Further facts about the SAE, such as how it was trained.

    Attributes:
        loaded_from: The arguments of `load`, for records of results. None if it was not loaded from a folder.
    """

    def __init__(
        self,
        width: int,
        features: int,
        kind: str = "topk",
        k: int | None = 32,
        point: str | None = None,
        of: str = "output",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(features, kind, k, of)
        if not fits(width, int) or width < 1:
            raise InputError(f"width is the number of dimensions of a vector, 1 or more, not {width!r}")
        self.width, self.kind, self.point, self.of = width, kind, point, of
        self.k = k if kind in ("topk", "batch_topk") else None
        self.facts = dict(facts or {})
        self.loaded_from: dict[str, str] | None = None
        decoder = nn.functional.normalize(torch.randn(features, width), dim=-1)
        self.decoder, self.decoder_bias = nn.Parameter(decoder), nn.Parameter(torch.zeros(width))
        self.encoder, self.encoder_bias = nn.Parameter(decoder.T.clone()), nn.Parameter(torch.zeros(features))
        if kind == "jumprelu":
            self.threshold = nn.Parameter(torch.full((features,), 1e-3))
        elif kind == "batch_topk":
            self.register_buffer("threshold", torch.zeros(()))

    @property
    def count(self) -> int:
        """The number of features."""
        return len(self.decoder)

    def before_activation(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input of the activation function, (..., features)."""
        return (
            torch.addmm(self.encoder_bias, (x - self.decoder_bias).reshape(-1, self.width), self.encoder)
            .unflatten(0, x.shape[:-1] or (1,))
            .reshape(*x.shape[:-1], self.count)
        )

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features of vectors, (..., width) to (..., features). The SAE moves to the device of the vectors.

        Raises:
            InputError: The vectors have another width.
        """
        if x.shape[-1] != self.width:
            raise InputError(f"the SAE is for vectors of width {self.width}, but these have {x.shape[-1]}")
        if x.device != self.encoder.device:
            self.to(x.device)
        values = self.before_activation(x.to(self.encoder.dtype))
        if self.kind == "topk":
            return topk_(values, self.k)
        if self.kind == "relu":
            return values.relu()
        if self.kind == "batch_topk" and self.training:
            return batch_topk_(values, self.k)
        return above(values, self.threshold)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Return the vectors that features stand for, (..., features) to (..., width)."""
        return features @ self.decoder + self.decoder_bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of vectors, (..., width)."""
        return self.decode(self.encode(x))

    def save(self, folder: str | Path) -> list[Path]:
        """Write `cfg.json` and `sae_weights.safetensors` as SAELens does, and return their paths.

        A BatchTopK autoencoder is written as a JumpReLU autoencoder with its threshold, as in SAELens.
        """
        return write_sae(self, folder)

    @classmethod
    def load(cls, source: str | Path, subfolder: str | None = None) -> "SAE":
        """Load an autoencoder from a folder, a packaged name or a hub id.

        The folder may come from SAELens, `dictionary_learning` or sdxl-unbox. Files that can execute code when they are
        read are refused.

        Raises:
            InputError: There is no SAE, or its files are damaged or of an unknown kind.
        """
        arguments, tensors = read_sae(source, subfolder)
        sae = cls(**arguments)
        sae.load_state_dict(tensors)
        sae.loaded_from = {"source": str(source)} | ({"subfolder": subfolder} if subfolder else {})
        return sae.eval().requires_grad_(False)
