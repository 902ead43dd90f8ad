"""The fitted exponents."""

import pytest

from objslot.benchmarks.scaling import exponent, summary


@pytest.mark.parametrize("power", [0, 1, 2])
def test_exponent_of_a_power_law(power):
    sizes = [64, 256, 1024, 4096]
    assert exponent(sizes, [3e-6 * size**power for size in sizes]) == pytest.approx(power)


def test_fixed_costs_at_small_sizes_do_not_hide_a_quadratic():
    sizes = [64, 256, 1024, 4096, 16384]
    assert exponent(sizes, [1e-4 + 1e-9 * size**2 for size in sizes]) > 1.9


def test_no_exponent_where_a_value_is_missing():
    points = [{"size": size, "seconds": size * 1e-6, "peak_bytes": None} for size in (1, 2, 4)]
    found = summary(points)
    assert found["time_exponent"] == pytest.approx(1) and found["memory_exponent"] is None
