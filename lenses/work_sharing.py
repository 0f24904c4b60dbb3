"""Processes that share work, such as a sweep or a training: all that a launcher (`accelerate launch` or `torchrun`) has
started, or only this one.

processes = Processes()
for item in processes.share(missing):       # every process gets its own part
    ...
processes.wait()                            # until all are here
processes.average([weight.grad])            # in place, over all processes
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

from diffsight.errors import InputError

Item = TypeVar("Item")
_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # how many processes mpirun has started
_FOREVER = timedelta(days=30)  # one process may have much more to do than the others


class Processes:
    """The processes of this program, as the environment variables of PyTorch's launchers describe them.

    Attributes:
        number: The number of this process, from 0.
        count: The number of processes.
        device: The device of this process; None if there is only one process.
    """

    def __init__(self) -> None:
        self.number, self.count, self.device = 0, 1, None
        if "WORLD_SIZE" not in os.environ and any(int(os.environ.get(name, "1")) > 1 for name in _OF_MPI):
            raise InputError(
                "MPI started several processes, which PyTorch does not detect: start them with torchrun instead"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from torch import distributed

            if not distributed.is_initialized():
                distributed.init_process_group("gloo", timeout=_FOREVER)
            self.number, self.count = distributed.get_rank(), distributed.get_world_size()
            kind = "cuda" if torch.cuda.is_available() else "cpu"
            self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) if kind == "cuda" else None)

    @property
    def is_main(self) -> bool:
        """Whether this process does the work that must be done only once."""
        return self.number == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's share of the items. All processes must pass the same list.

        No process begins before all have their list."""
        self.wait()
        return items[self.number :: self.count]

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()

    def average(self, tensors: "Sequence[torch.Tensor]") -> None:
        """Replace tensors, such as gradients, by their means over all processes."""
        if self.count > 1:
            import torch
            from torch import distributed

            joined = torch.cat([tensor.flatten() for tensor in tensors])
            distributed.all_reduce(joined)
            for tensor, part in zip(tensors, joined.div_(self.count).split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part.view_as(tensor))

    def any(self, mask: "torch.Tensor") -> "torch.Tensor":
        """Return where a mask is true in any process."""
        if self.count == 1:
            return mask
        from torch import distributed

        counts = mask.int()
        distributed.all_reduce(counts, distributed.ReduceOp.MAX)
        return counts.bool()

    def copy_from_main(self, tensors: "Sequence[torch.Tensor]") -> None:
        """Replace tensors by those of the main process."""
        if self.count > 1:
            from torch import distributed

            for tensor in tensors:
                distributed.broadcast(tensor, 0)
