"""Sinkhorn transport on GPUs by Triton: which passes over the scores make the results, and their launches.

Half types are multiplied as they come, and their cosines divided by the lengths afterwards; float32 takes three TF32
products. Deterministic.
"""

import math

import torch
import triton

from objslot.ops._arithmetic import SHORTEST
from objslot.ops.transport import triton_passes as passes

LOG2_E = math.log2(math.e)
MOST_VALUES = 128
BLOCK_TOKENS = 64
# The same in all passes, see triton_passes. Three products of TF32 hold three tiles for one.
BLOCK_FEATURES = {"tf32": 32, "tf32x3": 16, "ieee": 32}
# Features of a token whose gradient a program sums up.
BLOCK_GRADIENT = 64


def why_not(*, dtype, tol=None, **facts) -> str | None:
    """Why these kernels cannot serve a call on a CUDA tensor, or None."""
    if tol is not None:
        return "makes all iterations, got a tol"
    return "computes in float32, got float64" if dtype == torch.float64 else None


def precision(dtype: torch.dtype) -> str:
    """How the matrix units multiply float32 numbers that came as `dtype`."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _flat(tensor, trailing):
    batch = math.prod(tensor.shape[: tensor.dim() - trailing])
    return tensor.reshape(batch, *tensor.shape[tensor.dim() - trailing :]).contiguous()


def _at_most(block: int, size: int) -> int:
    return min(block, max(16, triton.next_power_of_2(size)))


class _Pair:
    """The two sets of tokens of a call, flat and contiguous, and the launches on them."""

    def __init__(self, x, y, eps, similarity):
        self.x, self.y = _flat(x, 2), _flat(y, 2)
        self.lengths = None
        self.scaled = False
        if similarity == "cosine":
            self.lengths = [
                torch.linalg.vector_norm(t, dim=-1, keepdim=True, dtype=torch.float32) for t in (self.x, self.y)
            ]
            for lengths in self.lengths:
                # Divided by that, and in the gradient too, a token is zero.
                lengths.masked_fill_(lengths < SHORTEST, math.inf)
            # Half numbers are multiplied exactly; float32 ones may be too large to be.
            self.scaled = x.dtype != torch.float32
            if not self.scaled:
                self.x, self.y = self.x / self.lengths[0], self.y / self.lengths[1]
        # Where they are not read any address will do.
        self.inverse = [(1 / t).squeeze(-1) for t in self.lengths] if self.scaled else [self.x, self.y]
        self.batch, self.n, self.width = self.x.shape
        self.m = self.y.shape[1]
        self.factor = LOG2_E / eps
        self.precision = precision(x.dtype)
        self.tokens = BLOCK_TOKENS if self.precision == "tf32" else BLOCK_TOKENS // 2

    def launch(self, kernel, swapped, columns_of_grid, *arguments, warps=4, **constants):
        rows, columns = _at_most(self.tokens, self.n), _at_most(self.tokens, self.m)
        blocks = triton.cdiv(self.m, columns) if swapped else triton.cdiv(self.n, rows)
        kernel[self.batch, blocks, columns_of_grid](
            self.x, self.y, *self.inverse, *arguments,
            WIDTH=self.width, ROWS=rows, COLUMNS=columns, SCALED=self.scaled, PRECISION=self.precision,
            BLOCK=_at_most(BLOCK_FEATURES[self.precision], self.width), num_warps=warps, **constants,
        )  # fmt: skip

    def potential(self, swapped, masses, others, out):
        self.launch(
            passes._set_potential, swapped, 1, masses, others, out, self.n, self.m, self.factor,
            SWAPPED=swapped, HAS_MASS=masses is not None, HAS_OTHERS=others is not None,
        )  # fmt: skip

    def iterate(self, a, b, start, n_iters):
        """Potentials f (n_iters, batch, n) and g (n_iters, batch, m), from g = `start` in base 2, or 0."""
        f = self.x.new_empty((n_iters, self.batch, self.n), dtype=torch.float32)
        g = self.x.new_empty((n_iters, self.batch, self.m), dtype=torch.float32)
        for step in range(n_iters):
            self.potential(False, a, g[step - 1] if step else start, f[step])
            self.potential(True, b, f[step], g[step])
        return f, g

    def moved(self, swapped, f, g, values):
        """plan @ values, or with `swapped` plan' @ values."""
        found = values.new_empty((self.batch, self.m if swapped else self.n, values.shape[-1]), dtype=torch.float32)
        out = _at_most(MOST_VALUES // (1 if self.precision == "tf32" else 2), values.shape[-1])
        self.launch(
            passes._apply, swapped, triton.cdiv(values.shape[-1], out), f, g, values, found, self.n, self.m,
            self.factor, SWAPPED=swapped, VALUES=values.shape[-1], OUT=out,
        )  # fmt: skip
        return found

    def row_sums(self, f, g, first, second=None):
        """Over the columns, of 2^(logits + f + g) times `first`, and times `second` where there is one."""
        found = [first.new_empty(self.batch, self.n) for _ in range(1 if second is None else 2)]
        self.launch(
            passes._row_sums, False, 1, f, g, first, second, found[0], found[-1], self.n, self.m, self.factor,
            BOTH=second is not None,
        )  # fmt: skip
        return found if second is not None else found[0]

    def column_sums(self, f, g, weights, earlier_f, earlier_g):
        """Over the rows, of 2^(logits + f + g) times `weights`, unless that is None; and of 2^(logits + earlier)."""
        sums, earlier = (g.new_empty(self.batch, self.m) for _ in range(2))
        self.launch(
            passes._column_sums, True, 1, f, g, weights, earlier_f, earlier_g, sums, earlier, self.n, self.m,
            # Two sets of potentials at a time spill registers of four warps.
            self.factor, WEIGHTED=weights is not None, warps=8 if self.precision == "tf32x3" else 4,
        )  # fmt: skip
        return sums, earlier

    def token_gradient(self, swapped, f, g, left, right, left_values, right_values, eps):
        """The gradient of x, or with `swapped` of y, through the lengths of the tokens too."""
        tokens = self.y if swapped else self.x
        found = tokens.new_empty(tokens.shape, dtype=torch.float32)
        out = _at_most(BLOCK_GRADIENT, self.width)
        self.launch(
            passes._token_gradient, swapped, triton.cdiv(self.width, out), f, g, left, right, left_values,
            right_values, found, self.batch, self.n, self.m, self.factor, left.shape[0], SWAPPED=swapped,
            VALUES=left_values.shape[-1], OUT=out,
            VALUE_BLOCK=_at_most(BLOCK_FEATURES[self.precision], left_values.shape[-1]),
        )  # fmt: skip
        found /= eps
        if self.lengths is None:
            return found
        lengths = self.lengths[int(swapped)]
        unit = tokens / lengths if self.scaled else tokens
        return (found - (found * unit).sum(-1, keepdim=True) * unit) / lengths


def _vectors(a, b, start):
    """The marginals flat, and the first potentials of the columns, in base 2."""
    a, b, start = (None if vector is None else _flat(vector, 1) for vector in (a, b, start))
    return a, b, None if start is None else start * LOG2_E


def forward(x, y, values, a, b, start, eps, n_iters, tol, similarity, return_error):
    """plan @ values, and the marginal error, None unless asked for."""
    shape = (*x.shape[:-1], values.shape[-1])
    if not math.prod(x.shape):
        return values.new_empty(shape), values.new_empty(shape[:-2], dtype=torch.float32)
    with torch.cuda.device_of(x):
        pair = _Pair(x, y, eps, similarity)
        mass, other_mass, first = _vectors(a, b, start)
        f, g = pair.iterate(mass, other_mass, first, n_iters)
        error = None
        if return_error:
            found = pair.row_sums(f[-1], g[-1], torch.ones_like(g[-1]))
            error = (found - (1 / pair.n if mass is None else mass)).abs().sum(-1).view(shape[:-2])
        if not shape[-1]:
            return values.new_empty(shape), error
        return pair.moved(False, f[-1], g[-1], _flat(values, 2)).to(values.dtype).view(shape), error


def backward(grad, x, y, values, a, b, start, eps, n_iters, tol, similarity):
    """Gradients of the five tensors; the forward is repeated."""
    tensors = (x, y, values, a, b)
    if not math.prod((*x.shape[:-1], values.shape[-1])):
        return tuple(None if t is None else torch.zeros_like(t) for t in tensors)
    with torch.cuda.device_of(x):
        flat_a, flat_b, first = _vectors(a, b, start)
        grad, flat_values = _flat(grad, 2), _flat(values, 2)
        pair = _Pair(x, y, eps, similarity)
        f, g = pair.iterate(flat_a, flat_b, first, n_iters)
        grad_values = pair.moved(True, f[-1], g[-1], grad)
        start_f = (grad.float() * pair.moved(False, f[-1], g[-1], flat_values)).sum(-1)
        grad_g = (flat_values.float() * grad_values).sum(-1)
        left, right = f.new_ones(n_iters, 2, pair.batch, pair.n), g.new_ones(n_iters, 2, pair.batch, pair.m)
        # See _two_plans and _undo of Sinkhorn's kernels: the same steps on vectors.
        before = torch.cat([torch.zeros_like(g[:1]) if first is None else first[None], g[:-1]])
        powers = torch.maximum(g, before)
        base = powers.masked_fill(powers == -torch.inf, 0)
        before = torch.exp2(before - base)
        right[:, 1] = before
        grad_a, grad_b = torch.zeros_like(f[0]), torch.zeros_like(g[0])
        mass_a = 1 / pair.n if flat_a is None else flat_a
        mass_b = 1 / pair.m if flat_b is None else flat_b
        _, sums = pair.column_sums(f[-1], powers[-1], None, f[-1], powers[-1])
        for step in reversed(range(n_iters)):
            # Not by the masses: weights that sum to one exactly leave no remainder of what has to cancel.
            nothing = g[step] == -torch.inf
            right[step, 0] = torch.where(nothing, 0, grad_g / sums)
            grad_b += torch.where(nothing, 0, grad_g / mass_b)
            product, found = pair.row_sums(f[step], powers[step], right[step, 0], before[step])
            gradient = start_f - product if step == n_iters - 1 else -product
            nothing = f[step] == -torch.inf
            grad_a += torch.where(nothing, 0, gradient / mass_a)
            left[step, 1] = torch.where(nothing, 0, gradient / found)
            if step:
                earlier = f[step - 1], powers[step - 1]
                collected, sums = pair.column_sums(f[step], powers[step], left[step, 1], *earlier)
                grad_g = -before[step] * collected
        f, g = torch.cat([f, f[-1:]]), torch.cat([powers, g[-1:]])
        sides = (f, g, left, right, grad, flat_values, eps)
        found = (pair.token_gradient(False, *sides), pair.token_gradient(True, *sides), grad_values, grad_a, grad_b)
    return tuple(
        None if t is None else part.view(t.shape).to(t.dtype) for t, part in zip(tensors, found, strict=True)
    )


def alignment(tokens, values, masses, eps, n_iters, similarity):
    """All ordered pairs of frames in one batch."""
    frames = tokens.shape[-3]
    if frames == 1:
        return torch.zeros_like(values)
    pairs = [(i, j) for i in range(frames) for j in range(frames) if i != j]
    rows, columns = (torch.tensor(side, dtype=torch.int64).to(tokens.device) for side in zip(*pairs, strict=True))
    a, b = (None if masses is None else masses.index_select(-2, side) for side in (rows, columns))
    moved, _ = forward(
        tokens.index_select(-3, rows), tokens.index_select(-3, columns), values.index_select(-3, columns),
        a, b, None, eps, n_iters, None, similarity, False,
    )  # fmt: skip
    return torch.zeros_like(values).index_add(-3, rows, moved)
