"""Training an SAE in two processes that gloo connects, compared with the same updates by hand in one process."""

import multiprocessing
import os
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsight import train_sae
from diffsight.lenses import SAE, SAESettings
from diffsight.lenses.features.sae_trainer import geometric_median
from diffsight.lenses.work_sharing import Processes
from helpers import refusal

WIDTH, FEATURES, K, BATCH, UPDATES = 16, 32, 4, 64, 6
SETTINGS = SAESettings(updates=UPDATES, batch_size=BATCH, dead_after=1000, penalty=1e-3)


@pytest.fixture(scope="module")
def vectors():
    generator = torch.Generator().manual_seed(0)
    basis = torch.nn.functional.normalize(torch.randn(24, WIDTH, generator=generator), dim=-1)
    active = torch.rand(BATCH, 24, generator=generator) < 0.15
    return (active * torch.rand(BATCH, 24, generator=generator)) @ basis


def train(vectors, folder, kind="topk", **changes):
    options = {"features": FEATURES, "kind": kind, "k": K if "topk" in kind else None, "settings": SETTINGS}
    return train_sae(
        None, "layers[0]", vectors, **options | {"folder": folder, "buffer": 1, "progress": False} | changes
    )


def work(rank, port, folder, function):
    """What a launcher does: set the variables, and run the program."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    function(rank, folder)
    Processes().wait()  # the first one ends last, since the others talk through it


def launch(folder, function):
    """Run a function of the rank and the folder in two processes, as `accelerate launch` and `torchrun` start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank, port, folder, function)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0


def by_hand(vectors, kind):
    """Return the state of an SAE that makes the same updates in one process: the mean of the gradients of both halves.

    Every batch is a half of the vectors in whatever order, as each process has as many vectors as it takes."""
    torch.manual_seed(0)
    sae = SAE(WIDTH, FEATURES, kind, K if "topk" in kind else None)
    sae.decoder_bias.data = geometric_median(vectors[0::2])
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for update in range(UPDATES):
        adam.param_groups[0]["lr"] = 1e-3 * min(1, 5 * (UPDATES - update) / UPDATES)
        losses = []
        for x in (vectors[0::2], vectors[1::2]):
            left = x - sae.train()(x)
            losses.append(left.square().sum() / (x - x.mean(0)).square().sum())
            if kind == "relu":
                losses[-1] = losses[-1] + 1e-3 * sae.encode(x).sum(-1).mean()
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        with torch.no_grad():
            sae.decoder.grad -= (sae.decoder.grad * sae.decoder).sum(-1, keepdim=True) * sae.decoder
            adam.step()
            sae.decoder /= sae.decoder.norm(dim=-1, keepdim=True)
    return sae.state_dict()


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_two_processes_make_the_updates_of_one(vectors, kind, tmp_path):
    def program(rank, folder):
        state = train(vectors, folder / "sae", kind).state_dict()
        save_file({name: value.contiguous() for name, value in state.items()}, folder / f"{rank}.safetensors")

    launch(tmp_path, program)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    expected, saved = by_hand(vectors, kind), SAE.load(tmp_path / "sae").state_dict()
    assert first.keys() == expected.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) and torch.equal(value, saved[name])
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
    names = {path.name for path in (tmp_path / "sae").iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "training.json", "curve.png"}


def test_bad_input_in_two_processes(vectors, tmp_path):
    def program(rank, folder):
        odd = SAESettings(batch_size=3)
        message = refusal(train, vectors, None, settings=odd)
        message += refusal(train, vectors[:1], None)
        (folder / f"{rank}.txt").write_text(message)

    launch(tmp_path, program)
    for rank in range(2):
        message = (tmp_path / f"{rank}.txt").read_text()
        assert "batch_size must be a multiple of 2, the number of processes" in message
        assert "there are 2 processes for 1 prompts or vectors: start fewer" in message
