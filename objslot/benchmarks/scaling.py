"""How time and memory grow along one axis: the exponent of the growth."""

from collections.abc import Sequence

import numpy as np

# An exponent is fitted to no fewer points than these, the largest sizes: below them fixed costs count.
LEAST_FITTED = 3


def exponent(sizes: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The slope of log value over log size, least squares over the larger half of the sizes, at least three of them.

    1 for a linear growth, 2 for a quadratic one; None where a value is missing or not above 0.
    """
    pairs = sorted(zip(sizes, values, strict=True))
    pairs = pairs[-max(LEAST_FITTED, (len(pairs) + 1) // 2) :]
    if len(pairs) < 2 or any(value is None or value <= 0 for _, value in pairs):
        return None
    x, y = np.log(np.array(pairs, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def summary(points: Sequence[dict]) -> dict:
    """The points, each {"size", "seconds", "peak_bytes"}, and both exponents."""
    sizes = [point["size"] for point in points]
    return {
        "points": list(points),
        "time_exponent": exponent(sizes, [point["seconds"] for point in points]),
        "memory_exponent": exponent(sizes, [point["peak_bytes"] for point in points]),
    }
