"""What is measured: an operation at one size, the contestants that can serve it, and the least work it takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from math import prod

import torch
from torch import Tensor, nn

Call = Callable[..., object]


@dataclass(frozen=True)
class Work:
    """The least that any implementation must do, forward: bytes moved, multiply-adds times two, exponentials.

    `backward` is the same for forward and backward together, None where there is no gradient.
    """

    bytes: int
    flops: int = 0
    exponentials: int = 0
    backward: "Work | None" = None


@dataclass(frozen=True)
class Problem:
    """One operation on given tensors.

    Args:
        tensors: the positional arguments.
        settings: the keyword arguments that contestants share.
        ours: objslot's call; an `nn.Module` where parameters learn.
        exact: the definition, called with the tensors in float64.
        plain: the definition in eager PyTorch in the dtype of the tensors. Its own error sets the bound.
        gradients: places in `tensors` that have gradients; empty for operations without a backward pass.
        work: the least work.
    """

    tensors: tuple[Tensor, ...]
    settings: dict
    ours: Call
    exact: Call
    plain: Call
    gradients: tuple[int, ...]
    work: Work

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype


def settings_only(function: Call) -> Callable[[Problem], Call]:
    """Makes contestants of a function of the problem's tensors and settings."""
    return lambda problem: partial(function, **problem.settings)


@dataclass(frozen=True)
class Peer:
    """What a user would run instead.

    Args:
        name: as printed.
        make: the callable for a problem.
        package: what must be installed, by the name that pip knows.
        compiled: mode of torch.compile, or None for eager.
        refuses: why the peer does not take part in a problem, or None.
        other: in what it computes something else, where that is known; it is timed all the same, and labelled.
    """

    name: str
    make: Callable[[Problem], Call]
    package: str | None = None
    compiled: str | None = None
    refuses: Callable[[Problem], str | None] = field(default=lambda problem: None)
    other: str | None = None

    def missing(self) -> str | None:
        """Why the peer cannot run here at all, or None."""
        if self.package is None:
            return None
        try:
            metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return f"not installed: {self.package}"
        return None

    def build(self, problem: Problem) -> Call:
        call = self.make(problem)
        if self.compiled is None:
            return call
        return torch.compile(call, mode=None if self.compiled == "default" else self.compiled, dynamic=False)


def with_compiled(name: str, make: Callable[[Problem], Call], modes=("default", "max-autotune"), **details):
    """A peer in eager mode and compiled."""
    peers = [Peer(f"{name}, eager", make, **details)]
    for mode in modes:
        words = "compiled" if mode == "default" else f"compiled {mode}"
        peers.append(Peer(f"{name}, {words}", make, compiled=mode, **details))
    return peers


@dataclass(frozen=True)
class Operation:
    """An entry of the registry.

    Args:
        name: as on the command line.
        axes: what the sizes of a shape mean, in their order.
        build: (sizes, device, dtype) -> Problem; the same inputs at every call.
        peers: who else runs.
        shapes: those of the whole suite, the one that matters most first.
        quick: those of `--quick`.
        scaling: for an axis, the shapes along which it grows.
        dtypes: those that the operation is used in.
        differentiable: whether there is a backward pass to time.
    """

    name: str
    axes: tuple[str, ...]
    build: Callable[[Sequence[int], torch.device, torch.dtype], Problem]
    peers: Sequence[Peer]
    shapes: Sequence[tuple[int, ...]]
    quick: Sequence[tuple[int, ...]]
    scaling: dict[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    differentiable: bool = True

    @property
    def widest_mode(self) -> str:
        return "forward+backward" if self.differentiable else "forward"


def write_shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def generator(sizes: Sequence[int]) -> torch.Generator:
    """Seeded by the sizes: a resumed run sees the inputs of the first."""
    return torch.Generator().manual_seed(hash(tuple(sizes)) % 2**31)


def normal(source: torch.Generator, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=source).to(device, dtype)


def unit(source: torch.Generator, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal vectors of length 1 along the last dimension."""
    return nn.functional.normalize(torch.randn(shape, generator=source), dim=-1).to(device, dtype)


def size_in_bytes(dtype: torch.dtype, *shapes: Sequence[int]) -> int:
    return dtype.itemsize * sum(prod(shape) for shape in shapes)
