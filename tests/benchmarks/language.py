"""The cost of lenses on language models: logit lens, activations, patchscope, against plain PyTorch and nnterp.

    python -m venv peer && peer/bin/pip install nnterp==1.3.0 nnsight==0.7.0 torch transformers
    python tests/benchmarks/language.py --nnterp peer/bin/python       # without it nnterp's columns are omitted

It runs on `diffsight/smollm2` (with its extra) and a random GPT-2 with 12 layers, on one thread, interleaved. It prints
medians of processor time and of peak memory above the memory held before, and the largest difference between results.
nnterp runs in a process of its own, since it needs another version of nnsight.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import measured
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from diffsight import LanguageModel, collect_activations, logit_lens, patchscope_lens
from diffsight.lenses.patchscope import IDENTITY

FEW, MANY, SOURCES, BATCH, TOP = 32, 256, 4, 32, 5
ALL, LAST = "logit_lens, 4 prompts of 64 tokens, all", "logit_lens, 32 prompts of 128 tokens, last"
PRODUCT = 170  # rows of one product with the head: larger ones take no less time, and more memory
TASKS = ("logit_lens", ALL, LAST, "all logits", "collect", "patchscope")
NOUNS = ("tower", "river", "bridge", "garden", "castle", "market", "station", "harbour", "museum", "forest", "street")
PLACES = ("Paris", "London", "Berlin", "Rome", "Madrid", "Vienna", "Prague", "Dublin", "Athens", "Tokyo", "Cairo")
ENDS = ("is known for its", "stands in the middle of", "was built by a man called", "looks like a very large")


def sentences() -> list[str]:
    found = [f"The old {noun} near {place} {end}" for noun in NOUNS for place in PLACES for end in ENDS]
    random.Random(0).shuffle(found)
    return found


def build_gpt2(folder: Path) -> Path:
    """Write a random GPT-2 of the default size, with a tokenizer trained on the sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sentences(), trainer)
    end = "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


def texts_for(tokenizer: Any) -> dict[str, Any]:
    """Return prompts with the same number of tokens: nnterp does not handle positions in padded prompts."""
    lengths = {text: len(tokenizer(text)["input_ids"]) for text in sentences()}
    length = Counter(lengths.values()).most_common(1)[0][0]
    texts = [text for text, own in lengths.items() if own == length]
    texts = (texts * MANY)[:MANY]
    return {
        "few": texts[:FEW],
        "many": texts,
        "sources": texts[:SOURCES],
        "target": IDENTITY.text,
        "batch": BATCH,
    }


def ids_for(vocabulary: int) -> dict[str, torch.Tensor]:
    """Return the token ids of longer prompts, by task."""
    generator = torch.Generator().manual_seed(0)
    sizes = {ALL: (4, 64), LAST: (32, 128)}
    return {name: torch.randint(0, vocabulary, size, generator=generator) for name, size in sizes.items()}


# ---- plain PyTorch


@contextmanager
def hooks_on(modules: Iterator[torch.nn.Module], hook: Callable) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain(model: LanguageModel, given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    net, tokenizer = model.module, model.tokenizer
    llama = hasattr(net, "model")
    trunk = net.model if llama else net.transformer
    layers, norm = (trunk.layers, trunk.norm) if llama else (trunk.h, trunk.ln_f)

    @torch.no_grad()
    def states(texts: list[str]) -> list[torch.Tensor]:
        return states_of(tokenizer(texts, return_tensors="pt"), last=True)

    def states_of(inputs: dict[str, torch.Tensor], last: bool) -> list[torch.Tensor]:
        kept = []
        keep = lambda module, args, output: kept.append(output[:, -1] if last else output.flatten(0, 1))  # noqa: E731
        with hooks_on(layers, keep):
            trunk(**inputs, use_cache=False)
        return kept

    @torch.no_grad()
    def all_logits() -> torch.Tensor:
        return net.lm_head(norm(torch.stack(states(given["few"]), 1)))  # one product with the head for all layers

    @torch.no_grad()
    def lens() -> tuple[torch.Tensor, torch.Tensor]:
        return most_likely(all_logits())

    def most_likely(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top = logits.topk(TOP)
        return top.indices, (top.values - logits.logsumexp(-1, keepdim=True)).exp()

    @torch.no_grad()
    def lens_of(ids: torch.Tensor, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        found = states_of({"input_ids": ids}, last)
        read = [most_likely(net.lm_head(norm(rows))) for rows in torch.cat(found).split(PRODUCT)]
        shape = (len(found), len(ids), -1, TOP)  # layers, prompts, positions
        return tuple(torch.cat(parts).view(shape).transpose(0, 1) for parts in zip(*read))

    def collect() -> torch.Tensor:
        starts = range(0, MANY, BATCH)
        return torch.cat([torch.stack(states(given["many"][start : start + BATCH])) for start in starts], 1)

    @torch.no_grad()
    def scope() -> tuple[torch.Tensor, torch.Tensor]:
        target = tokenizer([given["target"]] * SOURCES, return_tensors="pt")
        top = []
        for layer, hidden in zip(layers, states(given["sources"])):

            def put(module: torch.nn.Module, args: tuple, output: torch.Tensor, hidden: Any = hidden) -> None:
                output[:, -1] = hidden

            with hooks_on([layer], put):
                top.append(net(**target, logits_to_keep=1, use_cache=False).logits[:, -1].softmax(-1).topk(TOP))
        return torch.stack([t.indices for t in top], 1), torch.stack([t.values for t in top], 1)

    cases = {name: partial(lens_of, given[name], last=name == LAST) for name in (ALL, LAST)}
    return {"logit_lens": lens, **cases, "all logits": all_logits, "collect": collect, "patchscope": scope}


def live(model: LanguageModel, given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    def lens() -> tuple[torch.Tensor, torch.Tensor]:
        found = logit_lens(model, given["few"], positions=-1, top_k=TOP)
        return found.ids[:, :, 0], found.probabilities[:, :, 0]

    def all_logits() -> torch.Tensor:
        return logit_lens(model, given["few"], positions=-1, top_k=TOP, keep_logits=True).logits[:, :, 0]

    def collect() -> torch.Tensor:
        return collect_activations(model, given["many"], batch_size=BATCH, progress=False).values

    def scope() -> tuple[torch.Tensor, torch.Tensor]:
        found = patchscope_lens(model, given["sources"], top_k=TOP, progress=False)
        return found.ids[:, :, 0], found.probabilities[:, :, 0]

    def lens_of(ids: torch.Tensor, positions: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        found = logit_lens(model, ids, positions=positions, top_k=TOP, progress=False)
        return found.ids, found.probabilities

    cases = {name: partial(lens_of, given[name], -1 if name == LAST else None) for name in (ALL, LAST)}
    return {"logit_lens": lens, **cases, "all logits": all_logits, "collect": collect, "patchscope": scope}


class Peer:
    """nnterp, in a process of its own."""

    def __init__(self, python: str, folder: Path, given: dict[str, Any]) -> None:
        worker = Path(__file__).with_name("nnterp_worker.py")
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, str(worker), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=clean | {"HF_HUB_OFFLINE": "1"},
        )
        self._tell(given)

    def run(self, task: str, result: Path | None = None) -> dict[str, float]:
        self._tell({"task": task, "result": str(result or "")})
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _tell(self, what: dict[str, Any]) -> None:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()


def apart(ours: Any, other: Any) -> float:
    """Return the largest difference of two results. For predictions: of the probabilities of our most likely tokens."""
    if isinstance(ours, torch.Tensor):
        return (ours - other).abs().max().item()
    ids, probabilities = ours
    if isinstance(other, torch.Tensor):  # over the whole vocabulary
        return (other.gather(-1, ids) - probabilities).abs().max().item()
    return (other[1] - probabilities).abs().max().item()


def compare(name: str, folder: Path, python: str | None, rounds: int, tasks: Sequence[str]) -> None:
    model = LanguageModel(str(folder), dispatch=True)
    given = texts_for(model.tokenizer)
    own = given | ids_for(len(model.tokenizer))
    ways = {"diffsight": live(model, own), "plain": plain(model, own)}
    peer = Peer(python, folder, given) if python else None
    tokens = len(model.tokenizer(given["few"][0])["input_ids"])
    print(f"\n{name}: {len(model.layers)} layers, {tokens} tokens in a prompt")
    for task in tasks:
        figures: dict[str, list[dict[str, float]]] = {}
        results = {way: known[task]() for way, known in ways.items()}  # warm
        far = {"plain": apart(results["diffsight"], results["plain"])}
        has_peer = peer is not None and not task.startswith("logit_lens")  # nnterp's always keeps the whole vocabulary
        if has_peer:
            ours = results["diffsight"].softmax(-1) if task == "all logits" else results["diffsight"]
            with tempfile.TemporaryDirectory() as place:
                peer.run(task, Path(place) / "result.safetensors")
                far["nnterp"] = apart(ours, load_file(Path(place) / "result.safetensors")["result"])
        results = ours = None
        for _ in range(rounds):
            order = [*ways, *(["nnterp"] if has_peer else [])]
            random.shuffle(order)
            for way in order:
                found = peer.run(task) if way == "nnterp" else measured(ways[way][task])[1]
                figures.setdefault(way, []).append(found)
        show(task, figures, far)
    if peer:
        peer.close()


def show(task: str, figures: dict[str, list[dict[str, float]]], far: dict[str, float]) -> None:
    def median(way: str, what: str) -> float:
        return statistics.median(found[what] for found in figures[way])

    line = f"{task:<12}" + "".join(
        f"  {way} {median(way, 'cpu'):6.2f} s, {median(way, 'peak'):5.0f} MiB" for way in figures
    )
    line += f"  | time {median('diffsight', 'cpu') / median('plain', 'cpu'):.2f} of plain"
    if "nnterp" in figures:
        line += f", {median('diffsight', 'cpu') / median('nnterp', 'cpu'):.2f} of nnterp"
        line += f"; memory {median('diffsight', 'peak') / median('nnterp', 'peak'):.2f} of nnterp"
    print(line + "  | difference " + ", ".join(f"{distance:.0e} ({way})" for way, distance in far.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nnterp", help="a Python executable with nnterp 1.3.0")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=("smollm2", "gpt2"), default=("smollm2", "gpt2"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if "smollm2" in options.models:
        folder = LanguageModel("diffsight/smollm2").config.name_or_path
        compare("SmolLM2", Path(folder), options.nnterp, options.rounds, options.tasks)
    if "gpt2" in options.models:
        with tempfile.TemporaryDirectory() as place:
            compare("GPT-2, random", build_gpt2(Path(place)), options.nnterp, options.rounds, options.tasks)


if __name__ == "__main__":
    main()
