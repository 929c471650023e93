"""Several processes that train one network together, each on its share of every batch.

`torchrun` starts them, on one machine or on several, and tells each its number
in the environment. What they have to agree on comes from the first; what may
differ, such as deformations, each draws for itself. Tensors on GPUs go by nccl,
all else by gloo. Knows nothing of networks' or data's meaning.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from trainer.settings import InvalidSetting

T = TypeVar("T")

FAILED, TOLD = "trainer/failed", "trainer/told"
"""Keys in the processes' common store: how many failed, and whether the first of these has told."""

TELLING_SECONDS = 30
"""So long the others wait, before they end, for the process that failed to tell why."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; by default it is alone."""

    number: int = 0
    """From 0."""

    size: int = 1
    """How many there are, on all machines."""

    local: int = 0
    """Its number on its machine, which is that of its GPU."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads, prints and writes."""
        return self.number == 0

    def count(self, total: int) -> int:
        """How many of so many are this process's; the shares differ by one at most."""
        return total // self.size + (self.number < total % self.size)

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows of what all go through: as many as `count` says."""
        return torch.tensor_split(rows, self.size)[self.number] if self.size > 1 else rows

    def use(self, device: str) -> str:
        """The device of this process, where the settings say `device`.

        Raises:
            InvalidSetting: it is one that several processes cannot part.
        """
        if self.size == 1 or device == "cpu":
            return device
        if device != "cuda":
            raise InvalidSetting(f"--device is cpu or cuda for several processes, each with its own GPU, not {device}")
        if self.local >= (there := torch.cuda.device_count()):
            raise InvalidSetting(f"--device cuda takes a GPU for each process, and this machine has {there} GPUs")
        torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"

    def together(self, network: nn.Module) -> nn.Module:
        """The network, such that its gradients become the means over all processes, and its buffers the first's."""
        return network if self.size == 1 else DistributedDataParallel(network)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; the others make nothing."""
        if self.size == 1:
            return make()
        made: list[Any] = [make() if self.is_first else None]
        dist.broadcast_object_list(made, src=0)
        found: T = made[0]
        return found

    def agreed(self, values: Tensor) -> Tensor:
        """The first process's values, in all of them; the others' are overwritten."""
        if self.size > 1:
            dist.broadcast(values, src=0)
        return values

    def mean(self, value: float) -> float:
        """The mean of a number over all processes, the same in all."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self.size

    def all_of(self, value: T) -> list[T]:
        """What each process has, by their numbers; tensors have to be on the CPU."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, if it did.

    If one of them fails, all end. The first to fail raises its error; the others
    end silently, with status 1, once it has told, for what they would tell of is
    only that they miss it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    store, number, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size)
    ranks = Ranks(number, size, int(os.environ["LOCAL_RANK"]))
    try:
        yield ranks
    except BaseException:
        # No barrier, which the others may never come to, and no farewell, by which they could end before this one
        # has told what went wrong: torchrun ends all as soon as one has ended.
        if _failed_first(store):
            atexit.register(store.set, TOLD, "")
            raise
        raise SystemExit(1) from None
    ranks.wait()  # without it, a process that is late was seen to abort when the first was gone
    dist.destroy_process_group()


def _failed_first(store: Store) -> bool:
    """Whether no other process had failed before; else return once that one has told, or did not for long."""
    try:
        if store.add(FAILED, 1) == 1:
            return True
        store.wait([TOLD], timedelta(seconds=TELLING_SECONDS))
    except dist.DistNetworkError:  # whoever kept the store is gone, and knows no more who was first
        return True
    except dist.DistStoreError:  # the time is over
        return False
    return False
