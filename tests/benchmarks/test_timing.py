"""Interleaving, the rule for disturbed samples, and paired ratios."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from objslot.benchmarks import limits
from objslot.benchmarks.timing import Samples, _spread, measure, paired_ratio

CPU = torch.device("cpu")


class Clock:
    """Gives the seconds that a call returns, and remembers who was called."""

    def __init__(self):
        self.order = []

    def __call__(self, call, repeats):
        name, seconds = call()
        self.order.append((name, repeats))
        return seconds * repeats


def contestants(**seconds):
    return {name: lambda name=name, value=value: (name, value) for name, value in seconds.items()}


def test_ratio_is_paired_round_by_round():
    # The machine slows down threefold in the middle: each side's median wanders, the ratio does not.
    load = np.array([1, 1, 3, 3, 3, 1, 1.0])
    ours, peer = Samples(2e-3 * load), Samples(5e-3 * load)
    ratio = paired_ratio(peer, ours)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2.5, 2.5, 2.5))


def test_ratio_has_the_quartiles_of_the_ratios():
    ratio = paired_ratio(Samples(np.array([1.0, 2, 3, 4, 5])), Samples(np.ones(5)))
    assert (ratio.low, ratio.median, ratio.high) == (2, 3, 4)


def test_a_sample_beyond_the_outer_fence_is_dropped_with_its_round():
    ours = Samples(np.array([1.0, 1.01, 1.02, 1.03, 1.04, 9.0]))
    peer = Samples(np.array([2.0, 2.02, 2.04, 2.06, 2.08, 2.1]))
    assert ours.dropped == 1 and ours.taken == 6 and not ours.kept[-1]
    assert peer.dropped == 0
    assert ours.quartiles.high < 1.05
    assert paired_ratio(peer, ours).median == pytest.approx(2.0)


def test_the_fence_leaves_a_little_noise_alone():
    # Without a least range, any difference from identical samples would lie outside.
    assert Samples(np.array([1.0] * 9 + [1.05])).dropped == 0
    assert Samples(np.array([1.0] * 9 + [1.07])).dropped == 1


def test_rounds_in_which_a_contestant_did_not_take_part_count_for_nothing():
    peer = Samples(np.array([math.nan, 4.0, math.nan, 6.0]))
    assert peer.taken == 2 and peer.dropped == 0 and peer.quartiles.median == 5
    assert paired_ratio(peer, Samples(np.array([9.0, 1.0, 9.0, 2.0]))).median == 3.5
    assert paired_ratio(peer, Samples(np.array([1.0, math.nan, 1.0, math.nan]))) is None


def test_rounds_are_interleaved_in_changing_order():
    clock = Clock()
    samples = measure(contestants(a=1e-2, b=2e-2), 0.5, CPU, clock=clock, rounds=(3, 10), first_apart=False)
    rounds = [[name for name, _ in clock.order[2:][start : start + 2]] for start in range(0, 20, 2)]
    assert all(sorted(names) == ["a", "b"] for names in rounds)
    assert len({tuple(names) for names in rounds}) == 2
    assert samples["a"].taken == samples["b"].taken == 10
    assert samples["b"].quartiles.median == pytest.approx(2e-2)


def test_the_first_call_after_others_is_timed_apart():
    class Cold(Clock):
        """The call that follows another contestant's takes twice as long."""

        def __call__(self, call, repeats):
            before = self.order[-1][0] if self.order else None
            seconds = super().__call__(call, repeats)
            return seconds if before == self.order[-1][0] else seconds + call()[1]

    clock = Cold()
    samples = measure(contestants(a=1e-3, b=3e-3), 0.3, CPU, clock=clock, rounds=(4, 4))
    for name, seconds in (("a", 1e-3), ("b", 3e-3)):
        assert samples[name].quartiles.median == pytest.approx(seconds)
    # Where one round ends with the contestant that the next begins with, even its first call follows its own.
    assert Samples(samples["a"].first).quartiles.high == pytest.approx(2e-3)
    assert [repeats for name, repeats in clock.order[4:] if name == "b"] == [1, 7] * 4



def test_slow_contestants_meet_in_the_rounds_of_those_that_take_part_more_often():
    # Shares of 7 rounds that differ: 0.045 s may take part 5 times, 0.06 s 4 times, 0.2 s 3 times.
    seconds = {"ours": 0.045, "peer": 0.06, "package": 0.2}
    samples = measure(contestants(**seconds), 2.0, CPU, clock=Clock(), rounds=(7, 51))
    assert len({found.taken for found in samples.values()}) > 1
    for name, value in seconds.items():
        assert paired_ratio(samples[name], samples["ours"]).median == pytest.approx(value / 0.045)
        both = ~np.isnan(samples[name].seconds) & ~np.isnan(samples["ours"].seconds)
        assert both.sum() == min(samples[name].taken, samples["ours"].taken)


@pytest.mark.parametrize("count", [1, 2, 7, 13, 51])
def test_any_number_of_first_rounds_lies_far_apart(count):
    order = _spread(count)
    assert sorted(order) == list(range(count))
    if count > 3:
        assert max(order[:3]) - min(order[:3]) >= count // 2 - 1


def test_a_slow_contestant_does_not_use_up_the_budget():
    clock = Clock()
    samples = measure(contestants(fast=2e-2, slow=1.0), 2.0, CPU, clock=clock, rounds=(7, 31))
    assert samples["fast"].taken == 31
    assert samples["slow"].taken == 3
    assert paired_ratio(samples["slow"], samples["fast"]).median == pytest.approx(50)


def test_short_calls_are_repeated_within_a_sample():
    clock = Clock()
    samples = measure(contestants(a=1e-6), 0.1, CPU, clock=clock, rounds=(3, 3))
    assert clock.order[-1][1] >= 20000
    assert samples["a"].quartiles.median == pytest.approx(1e-6)


@pytest.mark.parametrize("seconds, calls", [(1e-3, 1 + limits.ATTEMPTS), (0.3, 3)])
def test_a_limit_is_not_measured_for_long(monkeypatch, seconds, calls):
    made = []
    monkeypatch.setattr(limits, "time", SimpleNamespace(perf_counter=lambda: seconds * len(made)))
    assert limits._fastest(lambda: made.append(None), CPU) == pytest.approx(seconds)
    assert len(made) == calls
