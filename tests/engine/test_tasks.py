"""`model.<path>` means the run of the task that asks, and what a run hands out are envoys."""

import asyncio
import threading
from types import MethodType

import pytest
import torch
from torch import nn

from diffsight import Model
from diffsight.errors import NoRunError
from models.nets import Net, inputs


def test_each_task_has_its_own_run():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model, seen = Model(net), {}

    async def work(number):
        x = torch.full((1, 4), float(number))
        with model.trace(x):
            await asyncio.sleep(0)
            seen[number] = model[0].output
            await asyncio.create_task(child(number))
        return x

    async def child(number):
        seen[number, "child"] = model[1].output

    async def main():
        given = await asyncio.gather(*map(work, range(5)))
        with model.trace(given[0]):
            other = asyncio.create_task(outside())
            await other
        return given

    async def outside():
        return model[0].output  # its task was started in the block

    with torch.no_grad():
        for number, x in enumerate(asyncio.run(main())):
            assert torch.equal(seen[number], net[0](x)) and torch.equal(seen[number, "child"], net[:2](x))


def test_a_task_has_no_run_of_another():
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    model = Model(net)

    async def main():
        opened, asked = asyncio.Event(), asyncio.Event()

        async def one():
            with model.trace(x):
                opened.set()
                await asked.wait()
                return model[0].output

        async def two():
            await opened.wait()
            with pytest.raises(NoRunError):
                model[0].output
            asked.set()

        return await asyncio.gather(one(), two())

    assert torch.equal(asyncio.run(main())[0], net(x))


def test_many_threads_on_one_model():
    net, errors = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), []
    model = Model(net)

    def work():
        x = torch.randn(2, 4)
        with torch.no_grad():
            for _ in range(200):
                try:
                    with model.trace(x):
                        assert torch.equal(model[0].output, net[0](x))
                except Exception as error:
                    errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors


def test_the_modules_of_a_run_are_envoys():
    net, x = Net(), inputs()
    model = Model(net)
    with torch.no_grad(), model.trace(x) as run:
        for name, module in run.named_modules():
            if name == "first":
                module.output = torch.zeros(2, 4)
        for module in run.layers.children():
            module.input
        run.get_submodule("last").input = torch.ones(2, 4)
        assert dict(model.named_modules())["layers.0"].path == "layers[0]"
    assert torch.equal(run.result, net.last(torch.ones(2, 4)))
    net.parts, net.named, net.get_last = [net.first, 3], {"last": net.last}, MethodType(lambda self: self.last, net)
    for get in (
        lambda handle: handle.parts[0],
        lambda handle: handle.named["last"],
        lambda handle: handle.get_last(),
        lambda handle: handle._modules["last"],
    ):
        assert isinstance(get(model), nn.Module)
        with torch.no_grad(), model.trace(x) as run:
            get(run).input = torch.zeros(2, 4)
        assert not any("input" in vars(module) for module in net.modules())
    assert torch.equal(run.result, net.last(torch.zeros(2, 4)))
    assert all(module is own for module, own in zip(model.modules(), net.modules()))  # outside a run, the module tree
    assert not any("output" in vars(module) for module in net.modules())
