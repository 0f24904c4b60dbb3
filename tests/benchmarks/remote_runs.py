"""What a remote run adds: a round trip against a bare WebSocket, a run of a pipeline, bytes, and clients at once.

    python tests/benchmarks/remote_runs.py
    python tests/benchmarks/remote_runs.py --ray        # a read through Ray Serve, against an echo through Ray Serve

The server runs in processes of its own, on the loopback. The times are wall-clock times, since several processes take
part: lower quartiles of rounds in shuffled order.
"""

import argparse
import multiprocessing
import random
import statistics
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import GPT2Config, GPT2LMHeadModel
from websockets.sync.client import connect
from websockets.sync.server import serve

from diffsight import DiffusionModel, LanguageModel
from diffsight.remote import connection
from remote.serving import serving

WIDTH = 256
TOKENS = {"1 KB": 1, "64 KB": 64, "1 MB": 1024}  # of float32, with 256 features each
PIPELINE = "diffsight/shapes-clip"
PORT = 18765  # of Ray Serve


def small_model():
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=WIDTH, n_positions=2048, vocab_size=61, bos_token_id=0, eos_token_id=0
    )
    return LanguageModel(GPT2LMHeadModel(config).eval())


def quiet_pipeline():
    model = DiffusionModel(PIPELINE)
    model.set_progress_bar_config(disable=True)
    return model


def server(addresses, done):
    """Serve the models, and an echo that returns as many bytes as it is asked for."""
    torch.set_num_threads(1)

    def echo(socket):
        for request in socket:
            socket.send(b"\1" * int(request.split(" ")[0]))

    with serving({"small": small_model(), PIPELINE: quiet_pipeline()}) as address:
        with serve(echo, "127.0.0.1", 0, compression=None, max_size=None) as bare:
            threading.Thread(target=bare.serve_forever, daemon=True).start()
            addresses.send((address, f"ws://127.0.0.1:{bare.socket.getsockname()[1]}"))
            done.wait()


def quartiles(ways, rounds):
    """Return the lower quartile of the seconds of each way."""
    times, names = {name: [] for name in ways}, list(ways)
    for name in names:
        ways[name]()
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            started = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.quantiles(measured, n=4)[0] for name, measured in times.items()}


@contextmanager
def ray_serve():
    """Serve the small model and an echo with Ray Serve; yield their addresses."""
    from ray import serve
    from ray_echo import Echo

    from diffsight.gallery.serve.serve_command import start

    with tempfile.TemporaryDirectory() as folder:
        small_model().module.save_pretrained(folder)
        start({"small": folder}, port=PORT, resources={"num_cpus": 0.1})
        serve.run(Echo.bind(), name="echo", route_prefix="/echo")
        yield f"http://127.0.0.1:{PORT}", f"ws://127.0.0.1:{PORT}/echo/"
        serve.shutdown()


def round_trips(address, echo, rounds):
    print("| a read of | remote | bare WebSocket | ratio |\n| --- | --- | --- | --- |")
    model = LanguageModel("small", remote=address)
    with connect(echo, compression=None, max_size=None, proxy=None) as socket:
        for name, tokens in TOKENS.items():
            with model.trace(torch.zeros(1, tokens, dtype=torch.long)) as run:
                size = frame_sizes(lambda run=run: run.layers[0].output)[0]
                request = f"{size} ".ljust(160)  # as long as the request for a value

                def bare(request=request):
                    socket.send(request)
                    socket.recv()

                found = quartiles({"remote": lambda run=run: run.layers[0].output, "bare": bare}, rounds)
                run.stop()
            remote, plain = found["remote"] * 1e3, found["bare"] * 1e3
            print(f"| {name} | {remote:.2f} ms | {plain:.2f} ms | {remote / plain:.2f} |")


def frame_sizes(function):
    """Return the sizes of the frames that are received in a call."""
    sizes, unpack = [], connection.unpack

    def counting(frame):
        sizes.append(len(frame))
        return unpack(frame)

    connection.unpack = counting
    try:
        function()
    finally:
        connection.unpack = unpack
    return sizes


def whole_runs(address, rounds):
    local, remote = quiet_pipeline(), DiffusionModel(PIPELINE, remote=address)

    def run(model):
        values = []
        with model.generate("a red circle", seed=0, num_inference_steps=20) as run:
            for _ in run.steps:
                values.append(run.unet.mid_block.output)
        return values, run.images

    found = quartiles({"local": lambda: run(local), "remote": lambda: run(remote)}, rounds)
    print(f"\n20 steps, one read each: {found['remote']:.2f} s remote, {found['local']:.2f} s local", end="")
    print(f" ({found['remote'] / found['local']:.2f} times)")
    values = []
    wire = sum(frame_sizes(lambda: values.extend(run(remote)[0])))
    tensors = sum(value.nbytes for value in values) + 64 * 64 * 3
    print(f"bytes received: {wire}, of the tensors and the image: {tensors} ({wire / tensors:.3f} times)")


def clients_at_once(address, runs):
    def client():
        model = LanguageModel("small", remote=address)
        barrier.wait()
        for _ in range(runs):
            with model.trace(torch.zeros(1, 16, dtype=torch.long)) as run:
                run.layers[0].output
                run.stop()

    print("\n| clients | runs a second |\n| --- | --- |")
    for count in (1, 8):
        barrier = threading.Barrier(count + 1)
        threads = [threading.Thread(target=client) for _ in range(count)]
        for thread in threads:
            thread.start()
        barrier.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        print(f"| {count} | {count * runs / (time.perf_counter() - started):.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="rounds of a read (default: 200)")
    parser.add_argument("--ray", action="store_true", help="measure reads through Ray Serve, in the extra `server`")
    options = parser.parse_args()
    rounds = options.rounds
    torch.set_num_threads(1)
    if options.ray:
        with ray_serve() as served:
            round_trips(*served, rounds)
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    done = context.Event()
    process = context.Process(target=server, args=(there, done))
    process.start()
    address, echo = here.recv()
    try:
        round_trips(address, echo, rounds)
        whole_runs(address, max(3, rounds // 40))
        clients_at_once(address, max(5, rounds // 10))
    finally:
        done.set()
        process.join()


if __name__ == "__main__":
    main()
