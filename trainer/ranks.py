"""Several processes that train one network together, each on its share of every batch.

`torchrun` starts them and tells each its number in the environment. What they
have to agree on is drawn by the first and sent to the others; what may differ,
such as deformations, each draws for itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; by default it is alone."""

    number: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.number == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of what all go through; never nothing, so that all make the same steps."""
        return rows[self.number :: self.size] if len(rows) > self.number else rows[-1:]

    def count(self, total: int) -> int:
        """How many of so many are this process's."""
        return len(range(self.number, total, self.size))

    def together(self, network: nn.Module) -> nn.Module:
        """The network, such that its gradients become the means over all processes."""
        return network if self.size == 1 else DistributedDataParallel(network)

    def agreed(self, values: Tensor) -> Tensor:
        """The first process's values, in all of them."""
        if self.size > 1:
            dist.broadcast(values := values.to(_device()), src=0)
        return values.cpu()

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return float(total) / self.size

    def all_of(self, value: Tensor) -> list[Tensor]:
        """A tensor of every process, by its number."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, str]]:
    """Join the processes that `torchrun` started, if it did; give the place among them and the device to use."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(), device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()


def _device() -> str:
    """Where tensors lie that are exchanged: nccl knows GPUs only."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
