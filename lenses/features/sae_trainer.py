"""Train a sparse autoencoder: the loop over updates, the loss, and checkpoints.

The loss is the share of unexplained variance, plus a penalty for the kinds that need one. For TopK and BatchTopK, it
also includes how poorly dead features reconstruct the remaining error (Gao et al., 2024, appendix A.2). The decoder
bias starts at the geometric median, the decoder at random directions, and the encoder at the transpose of the decoder.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.features.activation_stream import ShuffledBuffer
from diffsight.lenses.features.autoencoder import SAE
from diffsight.lenses.features.sparsity import ActiveFeatures, JumpReLU, decode_active, topk_
from diffsight.lenses.results.saving import save_files
from diffsight.lenses.work_sharing import Processes
from diffsight.pipelines.argument_types import check_types

CHECKPOINT = "checkpoint.safetensors"
_CHECKPOINT_SECONDS = 20
_FIGURES_SHOWN = {"explained_variance": "explained", "active": "L0", "dead": "dead"}
_MEDIAN_OF = 8192  # vectors at most
_AUXILIARY = 1 / 32  # the weight of the loss on dead features


@dataclass(frozen=True)
class SAESettings:
    """How an SAE is trained.

    Attributes:
        updates: The number of updates.
        batch_size: The number of vectors in an update, over all processes.
        learning_rate: The learning rate of Adam. It falls to 0 in the last fifth of the updates.
        penalty: The weight of the L1 norm of the features ("relu"), or of the number of active features ("jumprelu").
        dead_after: A feature is dead when it has not been active for this many vectors.
        bandwidth: The bandwidth of the kernel that estimates the gradient of the thresholds ("jumprelu").
    """

    updates: int = 2000
    batch_size: int = 2048
    learning_rate: float = 1e-3
    penalty: float = 1e-3
    dead_after: int = 200_000
    bandwidth: float = 0.05

    def __post_init__(self) -> None:
        check_types(SAESettings.__init__, **vars(self))
        for name, value in vars(self).items():
            least = 1 if name in ("updates", "batch_size", "dead_after") else 0
            if value < least:
                raise InputError(f"{name} must be {least} or more, not {value!r}")


class _Parts(NamedTuple):
    """What an update needs of a batch.

    Attributes:
        decoded: The decoded vectors without the decoder bias, (vectors, width).
        penalty: The penalty on the features.
        used: Which features are active in any vector, (features,).
        active: The number of active features of all vectors.
    """

    decoded: torch.Tensor
    penalty: torch.Tensor | int
    used: torch.Tensor
    active: torch.Tensor


class SAETrainer:
    """An SAE in training. With several processes, each makes every update with its part of the batch.

    Args:
        sae: The SAE.
        settings: How it is trained.
        processes: The processes that train it together.
        facts: Further settings that identify this training, such as the seed, as JSON stores them.
    """

    def __init__(
        self,
        sae: SAE,
        settings: SAESettings,
        processes: Processes | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.sae, self.settings, self.done = sae.train(), settings, 0
        self._facts = {
            "kind": sae.kind,
            "k": sae.k,
            "point": sae.point,
            "of": sae.of,
            **asdict(settings),
            **(facts or {}),
        }
        self._processes = processes or Processes()
        self.curve: list[dict[str, float]] = []
        self._adam = torch.optim.Adam(sae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.999))
        self._unused = torch.zeros(sae.count, dtype=torch.long, device=sae.decoder.device)  # vectors since last active
        self._saved_at = time.monotonic()

    def start(self, vectors: torch.Tensor) -> None:
        """Set the decoder bias to the geometric median of some of the vectors. Every process gets the main process's
        bias."""
        some = vectors[:: math.ceil(len(vectors) / _MEDIAN_OF)]
        with torch.no_grad():
            self.sae.decoder_bias.copy_(geometric_median(some))
            self._processes.copy_from_main([self.sae.decoder_bias])

    def train(
        self, source: ShuffledBuffer, folder: Path | None, generator: torch.Generator, progress: bool = True
    ) -> None:
        """Make all remaining updates, and write checkpoints to the folder."""
        settings, processes = self.settings, self._processes
        every = max(1, settings.updates // 200)
        is_shown = progress and processes.is_main
        with tqdm(desc="SAE", total=settings.updates, initial=self.done, disable=not is_shown) as bar:
            for batch in source.batches(settings.batch_size // processes.count):
                if self.done >= settings.updates:
                    break
                found = self.update(batch)
                if self.done % every == 0 or self.done == settings.updates:
                    self.curve.append({"update": self.done} | {name: value.item() for name, value in found.items()})
                    bar.set_postfix({name: f"{self.curve[-1][key]:.3g}" for key, name in _FIGURES_SHOWN.items()})
                bar.update()
                if folder is not None and processes.is_main and self.is_due():
                    self.save(folder, source.position, generator)

    def update(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Make one update on a batch of vectors, (vectors, width), and return its metrics."""
        sae, settings = self.sae, self.settings
        self._set_learning_rate()
        parts = self._sparse_parts(x) if sae.k is not None else self._dense_parts(x)
        left = x - sae.decoder_bias - parts.decoded
        unexplained = left.square().sum() / _variance(x)
        self._count(parts.used, len(x))
        is_dead = self._unused >= settings.dead_after
        loss = unexplained + settings.penalty * parts.penalty + _AUXILIARY * self._auxiliary(x, left.detach(), is_dead)
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        self._processes.average([parameter.grad for parameter in sae.parameters()])
        self._keep_directions()
        self._adam.step()
        self._normalize()
        self.done += 1
        return {
            "explained_variance": 1 - unexplained.detach(),
            "active": parts.active / len(x),
            "dead": is_dead.float().mean(),
        }

    # ---- the loss

    def _sparse_parts(self, x: torch.Tensor) -> "_Parts":
        """Return the parts for "topk" and "batch_topk", whose gradients need the active features only."""
        sae = self.sae
        values, rows, numbers = ActiveFeatures.apply(*self._centered(x), sae.kind, sae.k)
        is_active = values.detach() > 0
        if sae.kind == "batch_topk":
            least = values.detach()[is_active].amin() if is_active.any() else sae.threshold
            with torch.no_grad():
                sae.threshold.copy_(least if self.done == 0 else 0.99 * sae.threshold + 0.01 * least)
                self._processes.average([sae.threshold])
        used = torch.zeros_like(self._unused, dtype=torch.bool)
        used[numbers[is_active]] = True
        return _Parts(decode_active(values, rows, numbers, sae.decoder, len(x)), 0, used, is_active.count_nonzero())

    def _dense_parts(self, x: torch.Tensor) -> "_Parts":
        """Return the parts for "relu" and "jumprelu"."""
        sae = self.sae
        vectors, encoder, bias = self._centered(x)
        before = torch.addmm(bias, vectors, encoder)
        if sae.kind == "relu":
            features = before.relu_()
            penalty, active = features.sum(-1).mean(), features.detach().sign().sum()
        else:
            features, counts = JumpReLU.apply(before, sae.threshold, self.settings.bandwidth)
            penalty, active = counts.mean(), counts.detach().sum()
        return _Parts(features @ sae.decoder, penalty, features.detach().amax(0) > 0, active)

    def _centered(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the vectors without the decoder bias, the encoder, and its bias.

        The gradient of the decoder bias flows through the encoder bias, summed over the vectors: through each vector,
        it would cost one more product."""
        sae = self.sae
        known = sae.decoder_bias.detach()
        return x - known, sae.encoder, sae.encoder_bias + (known - sae.decoder_bias) @ sae.encoder.detach()

    def _auxiliary(self, x: torch.Tensor, left: torch.Tensor, is_dead: torch.Tensor) -> torch.Tensor | int:
        """Return the auxiliary loss: how badly the dead features reconstruct the remaining error."""
        sae, dead = self.sae, is_dead.nonzero().flatten()
        if sae.k is None or len(dead) == 0:
            return 0
        vectors, encoder, bias = self._centered(x)
        before = torch.addmm(bias[dead], vectors, encoder[:, dead])
        features = topk_(before, min(len(dead), max(1, sae.width // 2)))
        return ((features @ sae.decoder[dead] - left).square().sum() / _variance(left)).nan_to_num()

    def _count(self, used: torch.Tensor, vectors: int) -> None:
        self._unused += vectors * self._processes.count
        self._unused[self._processes.any(used)] = 0

    # ---- the rows of the decoder keep length one

    @torch.no_grad()
    def _keep_directions(self) -> None:
        """Remove the part of the gradient that would only change the lengths of the rows."""
        decoder = self.sae.decoder
        decoder.grad -= (decoder.grad * decoder).sum(-1, keepdim=True) * decoder

    @torch.no_grad()
    def _normalize(self) -> None:
        self.sae.decoder.copy_(nn.functional.normalize(self.sae.decoder, dim=-1))
        if self.sae.kind == "jumprelu":
            self.sae.threshold.clamp_(min=0)

    def _set_learning_rate(self) -> None:
        settings = self.settings
        share = min(1.0, 5 * (settings.updates - self.done) / settings.updates)
        for group in self._adam.param_groups:
            group["lr"] = settings.learning_rate * share

    # ---- checkpoints

    def is_due(self) -> bool:
        """Return whether it is time for another checkpoint."""
        return time.monotonic() - self._saved_at > _CHECKPOINT_SECONDS

    def save(self, folder: Path, position: int, generator: torch.Generator) -> None:
        """Write a checkpoint that `resume` can continue from."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        names = [name for name, _ in self.sae.named_parameters()]
        for name, state in zip(names, self._adam.state_dict()["state"].values()):
            tensors |= {f"adam.{name}.{key}": value for key, value in state.items()}
        tensors |= {"unused": self._unused, "generator": generator.get_state()}
        facts = {"done": self.done, "position": position, "curve": self.curve, "training": self._facts}
        copies = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
        save_files(folder, {CHECKPOINT: partial(save_file, copies, metadata={"training": json.dumps(facts)})})
        self._saved_at = time.monotonic()

    def resume(self, folder: Path, generator: torch.Generator) -> int:
        """Continue from a checkpoint, and return the position in the data.

        Raises:
            InputError: The checkpoint is damaged, or belongs to a different training run.
        """
        try:
            with safe_open(folder / CHECKPOINT, framework="pt") as stored:
                facts = json.loads(stored.metadata()["training"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{folder / CHECKPOINT} is not a checkpoint, or is damaged: remove it to start again"
            ) from error
        own = {name.removeprefix("sae."): value for name, value in tensors.items() if name.startswith("sae.")}
        shapes = [{name: value.shape for name, value in one.items()} for one in (own, self.sae.state_dict())]
        known, wanted = facts["training"], json.loads(json.dumps(self._facts))
        other = [name for name in wanted if known.get(name) != wanted[name]]
        if other or shapes[0] != shapes[1]:
            raise InputError(
                f"{folder} holds the checkpoint of a training that differs in {', '.join(other) or 'sizes'}: use the "
                "same, or choose another folder"
            )
        self.sae.load_state_dict(own)
        names = [name for name, _ in self.sae.named_parameters()]
        keys = ("step", "exp_avg", "exp_avg_sq")
        state = {i: {key: tensors[f"adam.{name}.{key}"] for key in keys} for i, name in enumerate(names)}
        self._adam.load_state_dict({**self._adam.state_dict(), "state": state})
        self._unused, self.done, self.curve = tensors["unused"].to(self._unused), facts["done"], facts["curve"]
        generator.set_state(tensors["generator"])
        return facts["position"]


def _variance(vectors: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squared distances of vectors, (vectors, width), from their mean."""
    return (vectors - vectors.mean(0)).square().sum().clamp(min=1e-12)


def geometric_median(vectors: torch.Tensor, rounds: int = 50) -> torch.Tensor:
    """Return the point with the smallest sum of distances to vectors, (vectors, width), by Weiszfeld's iteration."""
    found = vectors.mean(0)
    for _ in range(rounds):
        weights = 1 / (vectors - found).norm(dim=-1, keepdim=True).clamp(min=1e-8)
        found = (weights * vectors).sum(0) / weights.sum()
    return found


def figures(sae: SAE, batches: Iterator[torch.Tensor]) -> dict[str, float]:
    """Return how well an SAE explains vectors: the explained variance, the number of active features, and the share of
    features that are never active."""
    left = total = active = count = 0.0
    used = torch.zeros(sae.count, dtype=torch.bool)
    sums, squares = torch.zeros(sae.width, dtype=torch.double), 0.0
    with torch.no_grad():
        for x in batches:
            features = sae.encode(x)
            left += (x - sae.decode(features)).double().square().sum().item()
            active += (features > 0).sum().item()
            used |= (features > 0).flatten(0, -2).any(0).cpu()
            count += x.numel() // sae.width
            sums += x.double().flatten(0, -2).sum(0).cpu()
            squares += x.double().square().sum().item()
    total = squares - (sums.square().sum() / count).item()
    return {"explained_variance": 1 - left / total, "active": active / count, "dead": 1 - used.float().mean().item()}
