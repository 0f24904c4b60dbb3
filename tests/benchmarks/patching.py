"""Activation patching of a 12-layer GPT-2 of real width: layers by positions, and layers by heads.

    python tests/benchmarks/patching.py                     # with nnsight 0.8.1 installed, against it too
    python tests/benchmarks/patching.py --rounds 5

- bound: plain PyTorch that computes what cannot be avoided and nothing else: for each layer, the rows that are patched
  there, from the stored state on, and the head at the last token.
- loop: a forward pass with a hook for each site and position.
- nnsight: an invoke for each, as many in a trace as diffsight has rows in a pass.

The third table is a sweep over a denoiser, rows in one call against a loop over the pipeline.

All ways run in one process on one thread, in turn, in an order that is shuffled in each round. The figures are lower
quartiles of the processor time. The results are compared.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from diffsight import DiffusionModel, LanguageModel, activation_patching
from diffsight.lenses import latent_distance, logit_difference

LAYERS, HEADS, TOKENS, WIDTH = 12, 12, 15, 768
RIGHT, WRONG = 1000, 2000
BATCH = 32


def build() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()


def difference(logits: torch.Tensor) -> torch.Tensor:
    """Return the metric from the logits of the last token, (rows, vocabulary)."""
    return logits[:, RIGHT] - logits[:, WRONG]


class Ways:
    """Every way to fill both tables."""

    def __init__(self) -> None:
        self.net = build()
        self.blocks, self.model = self.net.transformer.h, LanguageModel(self.net)
        self.clean, self.corrupted = torch.randint(0, 50000, (2, 1, TOKENS), generator=torch.manual_seed(1))
        self.peer = self._peer()

    def _peer(self) -> Any:
        try:
            from nnsight import LanguageModel as Peer
        except ImportError:
            return None
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="0")
        return Peer(self.net, tokenizer=tokenizer)

    # ---- diffsight

    def diffsight(self, sites: str) -> torch.Tensor:
        metric = logit_difference(RIGHT, WRONG)
        result = activation_patching(
            self.model, self.clean, self.corrupted, metric, sites=sites, batch_size=BATCH, progress=False
        )
        return result.values[0].reshape(LAYERS, -1)

    # ---- what cannot be avoided

    @torch.no_grad()
    def bound(self, sites: str) -> torch.Tensor:
        blocks = self.blocks
        clean, heads = self._states(self.clean)
        corrupted, own_heads = self._states(self.corrupted)
        found = []
        for layer, block in enumerate(blocks):
            if sites == "layers":
                rows = corrupted[layer + 1].repeat(TOKENS, 1, 1)
                rows[range(TOKENS), range(TOKENS)] = clean[layer + 1][0]
            else:
                mixed = own_heads[layer].repeat(HEADS, 1, 1).unflatten(-1, (HEADS, -1))
                mixed[range(HEADS), :, range(HEADS)] = heads[layer][0].unflatten(-1, (HEADS, -1)).transpose(0, 1)
                rows = corrupted[layer] + block.attn.c_proj(mixed.flatten(2))
                rows = rows + block.mlp(block.ln_2(rows))
            for following in blocks[layer + 1 :]:
                rows = following(rows)
                rows = rows if isinstance(rows, torch.Tensor) else rows[0]
            found.append(difference(self.net.lm_head(self.net.transformer.ln_f(rows[:, -1]))))
        return torch.stack(found)

    def _states(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the hidden states between the layers, and what goes into each output projection."""
        states, heads = [], []
        handles = [block.register_forward_pre_hook(lambda _, args: states.append(args[0])) for block in self.blocks]
        handles += [
            block.attn.c_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0])) for block in self.blocks
        ]
        last = self.net.transformer.ln_f.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        self.net(ids, use_cache=False, logits_to_keep=1)
        for handle in [*handles, last]:
            handle.remove()
        return states, heads

    # ---- a loop with hooks

    @torch.no_grad()
    def loop(self, sites: str) -> torch.Tensor:
        clean, heads = self._states(self.clean)
        found = torch.zeros(LAYERS, TOKENS if sites == "layers" else HEADS)
        for layer, block in enumerate(self.blocks):
            for i in range(found.shape[1]):
                if sites == "layers":

                    def hook(_: Any, args: tuple, output: Any, layer: int = layer, i: int = i) -> Any:
                        hidden = output if isinstance(output, torch.Tensor) else output[0]
                        hidden[:, i] = clean[layer + 1][:, i]
                        return output

                    handle = block.register_forward_hook(hook)
                else:

                    def before(_: Any, args: tuple, layer: int = layer, i: int = i) -> Any:
                        changed = args[0].clone()
                        changed[..., 64 * i : 64 * i + 64] = heads[layer][..., 64 * i : 64 * i + 64]
                        return (changed,)

                    handle = block.attn.c_proj.register_forward_pre_hook(before)
                found[layer, i] = difference(self.net(self.corrupted).logits[:, -1])
                handle.remove()
        return found

    # ---- nnsight

    @torch.no_grad()
    def nnsight(self, sites: str) -> torch.Tensor:
        model, clean, heads = self.peer, [], []
        with model.trace(self.clean):
            for layer in range(LAYERS):
                heads.append(model.transformer.h[layer].attn.c_proj.input.save())
                clean.append(model.transformer.h[layer].output.save())
        across = TOKENS if sites == "layers" else HEADS
        places = [(layer, i) for layer in range(LAYERS) for i in range(across)]
        found = []
        for start in range(0, len(places), BATCH):
            with model.trace() as tracer:
                for layer, i in places[start : start + BATCH]:
                    with tracer.invoke(self.corrupted):
                        if sites == "layers":
                            model.transformer.h[layer].output[:, i] = clean[layer][:, i]
                        else:
                            part = slice(64 * i, 64 * i + 64)
                            model.transformer.h[layer].attn.c_proj.input[..., part] = heads[layer][..., part]
                        logits = model.lm_head.output[:, -1]
                        found.append((logits[:, RIGHT] - logits[:, WRONG]).save())
        return torch.cat(found).unflatten(0, (LAYERS, across))


class Denoiser:
    """Cross-attentions by windows of steps of shapes-clip: a call of the pipeline for each row, or rows in one call."""

    prompts = "a red circle above a blue square", "a green circle above a blue square"
    arguments = {"num_inference_steps": 8, "guidance_scale": 3.0}
    windows = (slice(0, 4), slice(4, 8))

    def __init__(self) -> None:
        self.model = DiffusionModel("diffsight/shapes-clip")
        self.model.set_progress_bar_config(disable=True)
        self.pipe = self.model.pipeline
        self.sites = [name for name, _ in self.pipe.unet.named_modules() if name.endswith("attn2")]

    def diffsight(self) -> torch.Tensor:
        sites = [f"unet.{name}" for name in self.sites]
        options = {"sites": sites, "steps": self.windows, "seed": 0, "progress": False, **self.arguments}
        return activation_patching(self.model, *self.prompts, latent_distance(), **options).values[0]

    @torch.no_grad()
    def loop(self) -> torch.Tensor:
        kept: dict[str, list[torch.Tensor]] = {name: [] for name in self.sites}
        modules = {name: self.pipe.unet.get_submodule(name) for name in self.sites}
        handles = [
            module.register_forward_hook(lambda _, args, output, name=name: kept[name].append(output))
            for name, module in modules.items()
        ]
        clean = self._latents(self.prompts[0])
        for handle in handles:
            handle.remove()
        found = torch.zeros(len(modules), len(self.windows))
        for i, (name, module) in enumerate(modules.items()):
            for j, window in enumerate(self.windows):
                calls = iter(range(8))

                def hook(
                    _: Any, args: tuple, output: Any, name: str = name, calls: Any = calls, w: slice = window
                ) -> Any:
                    step = next(calls)
                    return kept[name][step] if w.start <= step < w.stop else None

                handle = module.register_forward_hook(hook)
                found[i, j] = (self._latents(self.prompts[1]) - clean).square().mean().sqrt()
                handle.remove()
        return found

    def _latents(self, prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return self.pipe(prompt, generator=generator, output_type="latent", **self.arguments).images


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({str(i): i for i in range(50257)}, unk_token="0"))


def figures(calls: dict[str, Callable[[], torch.Tensor]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the processor time of each call, and what it returned."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    results, order = {}, list(calls)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            started = time.process_time()
            results[name] = calls[name]()
            times[name].append(time.process_time() - started)
    quick = {name: statistics.quantiles(all_, n=4)[0] if len(all_) > 1 else all_[0] for name, all_ in times.items()}
    return quick, results


def show(title: str, calls: dict[str, Callable[[], torch.Tensor]], rounds: int, against: str) -> None:
    """Print the figures of some calls, and how far their results are from those of `against`."""
    quick, results = figures(calls, rounds)
    print(f"{title}: {results[against].numel()} rows")
    for name, seconds in quick.items():
        far = float((results[name] - results[against]).abs().max())
        print(f"  {name:10} {seconds:7.2f} s  {seconds / quick[against]:5.2f} x {against}  differs by {far:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("language", "denoiser"), help="one kind of model (default: both)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != "denoiser":
        ways = Ways()
        names = ["bound", "diffsight", "loop"] + (["nnsight"] if ways.peer is not None else [])
        for sites, title in (("layers", "layers x positions"), ("heads", "layers x heads")):
            calls = {name: lambda name=name, sites=sites: getattr(ways, name)(sites) for name in names}
            show(title, calls, options.rounds, "bound")
    if options.only != "language":
        denoiser = Denoiser()
        calls = {"diffsight": denoiser.diffsight, "loop": denoiser.loop}
        show("cross-attentions x windows of steps", calls, options.rounds, "loop")


if __name__ == "__main__":
    main()
