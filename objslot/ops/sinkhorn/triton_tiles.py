"""What the Triton kernels of Sinkhorn share: a tile of scores, and sums of exponentials of it in base 2."""

import triton
import triton.language as tl


@triton.jit
def _masses(masses, batch, stride, index, size, HAS: tl.constexpr, D: tl.constexpr):
    """The masses at `index`; nothing beyond `size`."""
    inside = index < size
    if HAS:
        mass = tl.load(masses + batch * stride + index, mask=inside, other=0.0).to(D)
    else:
        mass = tl.where(inside, tl.full((1,), 1.0, D) / size, tl.full((1,), 0.0, D))
    return mass


@triton.jit
def _logarithm(mass):
    return tl.where(mass == 0, float("-inf"), tl.log2(tl.where(mass == 0, 1.0, mass)))


@triton.jit
def _tile(scores, i, j, n, m, row_stride, column_stride, scale):
    """scores / eps in base 2; -inf beyond the matrix."""
    at = i[:, None].to(tl.int64) * row_stride + j[None, :].to(tl.int64) * column_stride
    tile = tl.load(scores + at, mask=(i < n)[:, None] & (j < m)[None, :], other=float("-inf"))
    return tile.to(scale.dtype) * scale


@triton.jit
def _largest(logits, AXIS: tl.constexpr):
    """The maximum, and 0 where there is nothing: so that nothing minus it is nothing again."""
    top = tl.max(logits, axis=AXIS)
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _potential(log_mass, top, total):
    """log_mass - log2(total * 2^top); -inf where either has no mass."""
    nothing = (log_mass == float("-inf")) | (total == 0)
    log_total = tl.log2(tl.where(total == 0, 1.0, total)) + top
    return tl.where(nothing, float("-inf"), tl.where(nothing, 0.0, log_mass) - log_total)


@triton.jit
def _join(top, total, other_top, other_total):
    """Sums relative to 2^top and 2^other_top as one: its exponent and its sum."""
    largest = tl.where(other_top > top, other_top, top)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, total * tl.exp2(top - base) + other_total * tl.exp2(other_top - base)


@triton.jit
def _set_rows(logits, g, log_a):
    """Potentials of the rows, and the logarithm of what they summed up to before."""
    shifted = logits + g[None, :]
    top = _largest(shifted, 1)
    total = tl.sum(tl.exp2(shifted - top[:, None]), axis=1)
    return _potential(log_a, top, total), top, total


@triton.jit
def _collect_columns(logits, f):
    """Largest exponent and sum of every column of a tile."""
    shifted = logits + f[:, None]
    top = tl.max(shifted, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(tl.exp2(shifted - base[None, :]), axis=0)


@triton.jit
def _missing(mass, f, top, total):
    """|row sum of the plan - a|, from the sum relative to 2^top that the other potentials leave."""
    found = tl.where(f == float("-inf"), 0.0, tl.exp2(f + top) * total)
    return tl.abs(found - mass)
