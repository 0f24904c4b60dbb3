"""Compare the training of an SAE on stored activations with SAELens's trainer, and its memory on long data.

    SAELENS_PYTHON=/path/to/bin/python OMP_NUM_THREADS=1 python tests/benchmarks/sae_training.py --rounds 5

SAELens is in an environment of its own, so each training is a process of its own; both take turns, on the same vectors,
sizes, batches and one thread, for each kind of SAE. The medians of processor time of the training alone are printed.
Without SAELENS_PYTHON, only the memory is measured. The option use_sparse_activations of SAELens, off by default, stays
off: in version 6.54.12 it raises an error on a CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

KINDS = ("topk", "batch_topk", "relu", "jumprelu")
SIZES = {"small": (128, 2048, 16, 1024, 50), "large": (512, 8192, 32, 1024, 10)}  # width, features, k, batch, updates

_DATA = """
import json, sys, time, torch
kind, *sizes = sys.argv[1:]
width, features, k, batch, updates = map(int, sizes)
torch.set_num_threads(1)
torch.manual_seed(0)
basis = torch.nn.functional.normalize(torch.randn(512, width), dim=-1)
active = (torch.rand(updates * batch, 512) < 0.02) * torch.rand(updates * batch, 512)
vectors = active @ basis
"""

OURS = """
from diffsight import train_sae
from diffsight.lenses import SAESettings
settings = SAESettings(updates=updates, batch_size=batch)
k = k if "topk" in kind else None
start = time.process_time()
train_sae(None, "layers[0]", vectors, features=features, kind=kind, k=k, settings=settings, progress=False)
print(json.dumps(time.process_time() - start))
"""

THEIRS = """
import sae_lens
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
name = {"topk": "TopK", "batch_topk": "BatchTopK", "relu": "Standard", "jumprelu": "JumpReLU"}[kind] + "TrainingSAE"
options = {"d_in": width, "d_sae": features} | ({"k": k} if "topk" in kind else {})
config = SAETrainerConfig(total_training_samples=updates * batch, train_batch_size_samples=batch, lr=1e-3, lr_end=1e-3,
                          logger=LoggingConfig(log_to_wandb=False))
sae = getattr(sae_lens, name)(getattr(sae_lens, name + "Config")(**options))
start = time.process_time()
order = torch.randperm(len(vectors))
SAETrainer(cfg=config, sae=sae, data_provider=(vectors[part] for part in order.split(batch))).fit()
print(json.dumps(time.process_time() - start))
"""

MEMORY = """
import resource
from diffsight import LanguageModel, train_sae
from diffsight.lenses import SAESettings
import transformers
sys.path[:0] = ["tests"]
from models import language
prompts = [f"the red circle {number} above a blue square" for number in range(updates)]
model = language.model(language.gpt2())
settings = SAESettings(updates=200, batch_size=256)
train_sae(model, "layers[1]", prompts, features=256, k=8, settings=settings, buffer=4096, progress=False)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
"""


def measured(python: str, code: str, kind: str, sizes: Sequence[int]) -> float:
    """Return what a process of its own prints: processor seconds, or megabytes."""
    command = [python, "-c", code, kind, *map(str, sizes)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def compare(theirs: str, rounds: int, kind: str, size: str) -> None:
    """Print the medians of both, and the range of their ratios."""
    times = []
    for _ in range(rounds):
        own = measured(sys.executable, _DATA + OURS, kind, SIZES[size])
        times.append((own, measured(theirs, _DATA + THEIRS, kind, SIZES[size])))
    own, other = (statistics.median(found) for found in zip(*times))
    least, most = (choose(ours / others for ours, others in times) for choose in (min, max))
    ratio = f"{own / other:.2f} times ({least:.2f} to {most:.2f})"
    print(f"{size} {kind}: diffsight {own:.2f} s, SAELens {other:.2f} s, {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds, theirs = parser.parse_args().rounds, os.environ.get("SAELENS_PYTHON")
    if theirs:
        for size in SIZES:
            for kind in KINDS:
                compare(theirs, rounds, kind, size)
    for count in (2_000, 200_000):
        code = _DATA.split("torch.manual_seed")[0] + MEMORY
        memory = measured(sys.executable, code, "topk", (*SIZES["small"][:4], count))
        print(f"{count} prompts: peak memory {memory:.0f} MB")


if __name__ == "__main__":
    main()
