"""Interleaved rounds of calls, and what is read from them.

A round gives every contestant one sample, in a new random order. A sample is several calls in a row, after a first one
that finds the caches as the others left them: that one is timed apart. A sample lies far out, and is dropped, when it
exceeds the third quartile of its contestant's samples by more than three interquartile ranges (Tukey's outer fence),
the range taken as at least 2 % of the median. The rule is the same for everybody, and the dropped samples are counted.
Ratios are formed inside a round, of samples that both stand.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

FENCE = 3.0
LEAST_RANGE = 0.02
# A sample has so many calls that it lasts this long, in seconds.
SHORTEST_SAMPLE = 20e-3
# The least and the most rounds.
ROUNDS = (7, 51)
# The share of the budget that one slow contestant may use up.
SLOW_SHARE = 1 / 3
LEAST_SAMPLES = 3


@dataclass(frozen=True)
class Quartiles:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values) -> "Quartiles":
        low, median, high = np.percentile(np.asarray(values, dtype=np.float64), (25, 50, 75))
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Samples:
    """Seconds a call of one contestant in every round, NaN where it did not take part.

    `first`: of the call before those of the sample, where it was timed apart.
    """

    seconds: np.ndarray
    first: np.ndarray | None = None

    @property
    def kept(self) -> np.ndarray:
        """Which rounds count: bool."""
        taken = self.seconds[~np.isnan(self.seconds)]
        if taken.size == 0:
            return np.zeros(self.seconds.shape, bool)
        quartiles = Quartiles.of(taken)
        spread = max(quartiles.high - quartiles.low, LEAST_RANGE * quartiles.median)
        with np.errstate(invalid="ignore"):
            return self.seconds <= quartiles.high + FENCE * spread

    @property
    def quartiles(self) -> Quartiles:
        return Quartiles.of(self.seconds[self.kept])

    @property
    def taken(self) -> int:
        return int((~np.isnan(self.seconds)).sum())

    @property
    def dropped(self) -> int:
        return self.taken - int(self.kept.sum())


def paired_ratio(slower: Samples, faster: Samples) -> Quartiles | None:
    """Quartiles of slower / faster over the rounds in which both count; None where there is no such round."""
    both = slower.kept & faster.kept
    return Quartiles.of(slower.seconds[both] / faster.seconds[both]) if both.any() else None


def measure(
    calls: dict[str, Callable[[], object]],
    budget: float,
    device: torch.device,
    *,
    clock: Callable[[Callable[[], object], int], float] | None = None,
    rounds: tuple[int, int] = ROUNDS,
    first_apart: bool = True,
) -> dict[str, Samples]:
    """Times warmed-up calls in interleaved rounds that take about `budget` seconds.

    Without `first_apart` the first call of a sample counts like the others: for calls that are too long to leave
    anything in the caches.

    A contestant that alone would use up much of the budget takes part in some of the rounds only, spread over the run;
    the rounds of one that takes part less often are among those of one that does so more often, to form ratios of both.
    `clock` gives the seconds that a number of calls took.
    """
    clock = clock or (cuda_seconds if device.type == "cuda" else cpu_seconds)
    once = {name: min(clock(call, 1) for _ in range(1 + first_apart)) for name, call in calls.items()}
    repeats = {name: max(1, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-7))) for name, seconds in once.items()}
    cost = {name: once[name] * (repeats[name] + first_apart) for name in calls}
    slow = {name for name in calls if cost[name] * rounds[0] > SLOW_SHARE * budget}
    fast = sum(cost[name] for name in calls if name not in slow)
    left = budget * (1 - SLOW_SHARE) if slow else budget
    count = rounds[0] if fast == 0 else min(rounds[1], max(rounds[0], int(left / fast)))
    empty = np.full(count, np.nan)
    samples = {name: Samples(empty.copy(), empty.copy() if first_apart else None) for name in calls}
    share = SLOW_SHARE * budget / max(len(slow), 1)
    takes_part, order = {}, _spread(count)
    for name in calls:
        wanted = count if name not in slow else min(count, max(LEAST_SAMPLES, int(share / cost[name])))
        takes_part[name] = set(order[:wanted])
    shuffle = random.Random(0)
    for number in range(count):
        names = [name for name in calls if number in takes_part[name]]
        shuffle.shuffle(names)
        for name in names:
            if first_apart:
                samples[name].first[number] = clock(calls[name], 1)
            samples[name].seconds[number] = clock(calls[name], repeats[name]) / repeats[name]
    return samples


def _spread(count: int) -> list[int]:
    """All of range(count), so that the first ones of any number lie far apart: by their bits in reverse."""
    bits = max(1, (count - 1).bit_length())
    return [place for place in (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits)) if place < count]


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def cuda_seconds(call: Callable[[], object], repeats: int) -> float:
    """Time on the device between two events, gaps between launches included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
