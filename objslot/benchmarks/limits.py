"""What the machine can do at best, measured in the run that uses it."""

import time
from collections.abc import Callable
from functools import cache

import torch

from objslot.benchmarks.problem import Work

# Sides of the square products that are tried, entries of a vector of exponentials that stays in the cache.
SIDES = (512, 1024, 2048)
SIDES_CUDA = (4096, 8192)
VECTOR = 1 << 17
VECTOR_CUDA = 1 << 26
ATTEMPTS = 7
# Seconds after which no further attempt, and no larger product, is made: it would be as fast.
ENOUGH = 0.5


def copy(moved: int, device: torch.device) -> Callable[[], object]:
    """A plain copy that moves as many bytes, read and written together."""
    source = torch.ones(max(1, moved // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def least(work: Work, copied: float, device: torch.device, dtype: torch.dtype, threads: int) -> dict:
    """Seconds below which no implementation gets: the largest of moving, multiplying and exponentiating.

    `copied` are the seconds of a copy of the work's bytes. "by" names the largest.
    """
    parts = {"copy": copied}
    if work.flops:
        parts["products"] = work.flops / product_rate(device, dtype, threads)
    if work.exponentials:
        parts["exponentials"] = work.exponentials / exponential_rate(device, threads)
    by = max(parts, key=parts.get)
    return {"seconds": parts[by], "by": by, **{f"{name}_seconds": value for name, value in parts.items()}}


@cache
def product_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Floating-point operations a second of square matrix products, the best of several sizes."""
    best = 0.0
    for side in SIDES_CUDA if device.type == "cuda" else SIDES:
        x, y = (torch.randn(side, side).to(device, dtype) for _ in range(2))
        seconds = _fastest(lambda x=x, y=y: x @ y, device)
        best = max(best, 2 * side**3 / seconds)
        if seconds > ENOUGH / ATTEMPTS:
            break
    return best


@cache
def exponential_rate(device: torch.device, threads: int) -> float:
    """Exponentials a second in float32, of torch.exp on data that stays close."""
    entries = VECTOR_CUDA if device.type == "cuda" else VECTOR * threads
    x = torch.randn(entries, device=device)
    y = torch.empty_like(x)
    return entries / _fastest(lambda: torch.exp(x, out=y), device)


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    attempts = [once()]
    while len(attempts) < ATTEMPTS and sum(attempts) < ENOUGH:
        attempts.append(once())
    return min(attempts)
