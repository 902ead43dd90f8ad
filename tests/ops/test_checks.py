"""Argument checks: what passes, and the one line that names the argument, what came and what was expected."""

import pytest
import torch

from objslot.ops import _checks

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("check", "arguments", "error", "message"),
    [
        (
            "tensor",
            ("x", [1.0], "(..., n, m)"),
            TypeError,
            "x: expected a tensor of shape (..., n, m), got list",
        ),
        (
            "tensor",
            ("x", X[0], "(..., n, m)"),
            ValueError,
            "x: expected at least 2 dimensions, (..., n, m), got (3,)",
        ),
        (
            "tensor",
            ("x", X[0, 0], "(..., n)"),
            ValueError,
            "x: expected at least 1 dimension, (..., n), got ()",
        ),
        (
            "floating",
            ("x", X.int()),
            TypeError,
            "x: expected float16, bfloat16, float32 or float64, got int32",
        ),
        ("like", ("y", X.double(), "x", X), TypeError, "y: expected float32, the dtype of x, got float64"),
        ("like", ("y", X.to("meta"), "x", X), ValueError, "y: expected device cpu, that of x, got meta"),
        ("shape", ("x", X, (2, 4), "(n, m)"), ValueError, "x: expected shape (n, m) = (2, 4), got (2, 3)"),
        ("expandable", ("x", X, (5, 2, 4), "(..., m)"), ValueError, "x: expected shape (..., m) = (5, 2, 4)"),
        ("expandable", ("x", X[:, :1], (2, 3), "(..., m)"), ValueError, "leading dimensions, got (2, 1)"),
        ("expandable", ("x", X, (3,), "(..., m)"), ValueError, "leading dimensions, got (2, 3)"),
        ("expandable", ("x", X, (4, 3), "(..., m)"), ValueError, "leading dimensions, got (2, 3)"),
        ("positive", ("eps", "1"), TypeError, "eps: expected a number above 0, got str"),
        ("positive", ("eps", True), TypeError, "eps: expected a number above 0, got bool"),
        ("positive", ("eps", 0.0), ValueError, "eps: expected a finite number above 0, got 0.0"),
        ("positive", ("eps", float("nan")), ValueError, "eps: expected a finite number above 0, got nan"),
        ("positive", ("eps", float("inf")), ValueError, "eps: expected a finite number above 0, got inf"),
        ("at_least", ("n", 1.0, 1), TypeError, "n: expected an integer, got float"),
        ("at_least", ("n", 0, 1), ValueError, "n: expected at least 1, got 0"),
        ("choice", ("kind", "c", ("a", "b")), ValueError, "kind: expected one of 'a', 'b', got 'c'"),
        (
            "non_negative",
            ("x", torch.tensor([1.0, -0.5])),
            ValueError,
            "x: expected no negative entry, got -0.5",
        ),
    ],
)
def test_refused(check, arguments, error, message):
    with pytest.raises(error) as caught:
        getattr(_checks, check)(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        ("tensor", ("x", X, "(..., n, m)")),
        ("tensor", ("x", X, "(..., m)")),
        ("like", ("y", X + 1, "x", X)),
        ("shape", ("x", X, torch.Size([2, 3]), "(n, m)")),
        ("expandable", ("x", X, (2, 3), "(..., m)")),
        ("expandable", ("x", X[:1], (7, 2, 3), "(..., m)")),
        ("expandable", ("x", X[0], (7, 2, 3), "(..., m)")),
        ("positive", ("eps", 1)),
        ("at_least", ("n", 1, 1)),
        ("choice", ("kind", "a", ("a", "b"))),
        ("non_negative", ("x", torch.tensor([0.0, float("nan")]))),
        ("non_negative", ("x", torch.zeros(0))),
        *(("floating", ("x", X.to(dtype))) for dtype in _checks.FLOATING),
    ],
)
def test_accepted(check, arguments):
    getattr(_checks, check)(*arguments)
