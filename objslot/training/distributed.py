"""One process or many: what torchrun sets up, gloo on CPUs and NCCL on GPUs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from objslot.errors import UserError
from objslot.training.checkpoint import reason


@dataclass(frozen=True)
class World:
    """This process among all that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.rank == 0

    def share(self, batch_size: int, parts: int) -> int:
        """Clips that a process takes at a time when a batch is cut into ``parts`` in every process."""
        if batch_size % (self.size * parts):
            raise UserError(
                f"batch_size: got {batch_size}, expected a multiple of processes x accumulate = {self.size} x {parts}"
            )
        return batch_size // (self.size * parts)

    def mean(self, values: list[float]) -> list[float]:
        """Each value's mean over the processes."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return (total / self.size).tolist()

    def gather(self, value):
        """The value of every process, in all of them."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader does the block, then the others; when it fails there, it fails in all of them."""
        failure = None
        if self.leads:
            try:
                yield
            except UserError as error:
                failure = error
        failure = self.gather(failure)[0]
        if failure is not None:
            raise failure
        if not self.leads:
            yield


@contextmanager
def join(device: str) -> Iterator[World]:
    """The world that torchrun started this process in, or a world of one.

    With torchrun every process takes the GPU of its local rank, or the CPU where ``device`` says so or there
    is none. A group that torchrun starts again (--max-restarts) on several machines needs
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun.

    Raises `UserError` when contact with the other processes is lost, or that variable is missing.
    """
    cuda = torch.cuda.is_available() and device != "cpu"
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        name = ("cuda" if cuda else "cpu") if device == "auto" else device
        yield World(0, 1, torch.device(name))
        return
    place = torch.device("cpu")
    if cuda:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    began = not distributed.is_initialized()
    if began:
        distributed.init_process_group("nccl" if cuda else "gloo", **_own_store())
    rank = distributed.get_rank()
    try:
        yield World(rank, size, place)
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            f"process {rank} of {size}: another process is gone ({reason(error)}); started again, the group "
            "goes on from its newest checkpoint (--resume)"
        ) from error
    finally:
        if began:
            distributed.destroy_process_group()


def _own_store() -> dict[str, Any]:
    """Arguments of init_process_group that keep a group which torchrun started again apart from the one before.

    torchrun lets both use one store, where the new processes would find the addresses of the old ones.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not restarts or os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1":
        return {}
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        # Each machine counts its own restarts, so the count cannot tell the groups apart.
        raise UserError(
            "torchrun started the group again on several machines: that needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "in the environment of torchrun"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shared = distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    return {"store": distributed.PrefixStore(f"restart-{restarts}", shared), "rank": rank, "world_size": size}
