"""Sinkhorn transport on GPUs by Triton: scores are made tile by tile by the matrix units, and never stored.

Every kernel works on blocks of rows and runs over all the columns; columns are updated by the same kernel with
the two sets of tokens exchanged. Potentials are in base 2. Half types are multiplied as they come, and their
cosines divided by the lengths afterwards; float32 takes three TF32 products. Deterministic.
"""

import math

import torch
import triton
import triton.language as tl

from objslot.ops._arithmetic import SHORTEST

LOG2_E = math.log2(math.e)
MOST_VALUES = 128
BLOCK_TOKENS = 64
BLOCK_FEATURES = 32
# Features of a token whose gradient a program sums up.
BLOCK_GRADIENT = 64


@triton.jit
def _logits(
    x, y, x_scale, y_scale, i, j, n, m,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS): scores / eps in base 2 but for the common factor; -inf in the columns beyond m."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        d = start + tl.arange(0, BLOCK)
        left = tl.load(
            x + i[:, None].to(tl.int64) * WIDTH + d[None, :], mask=(i < n)[:, None] & (d < WIDTH)[None, :], other=0.0
        )
        right = tl.load(
            y + j[None, :].to(tl.int64) * WIDTH + d[:, None], mask=(j < m)[None, :] & (d < WIDTH)[:, None], other=0.0
        )
        total += tl.dot(left, right, input_precision=PRECISION)
    if SCALED:
        total *= tl.load(x_scale + i, mask=i < n, other=0.0)[:, None]
        total *= tl.load(y_scale + j, mask=j < m, other=0.0)[None, :]
    return tl.where((j < m)[None, :], total, float("-inf"))


@triton.jit
def _set_potential(
    x, y, x_scale, y_scale, masses, others, potentials, n, m, factor,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, HAS_MASS: tl.constexpr, HAS_OTHERS: tl.constexpr,
):  # fmt: skip
    """log2(mass) - log2(sum over the columns of 2^(logits + others)) of a block of rows."""
    batch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, m, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        logits = factor * _logits(
            x + batch * n * WIDTH, y + batch * m * WIDTH, x_scale + batch * n, y_scale + batch * m, i, j, n, m,
            WIDTH, ROWS, COLUMNS, BLOCK, SCALED, PRECISION,
        )  # fmt: skip
        if HAS_OTHERS:
            logits += tl.load(others + batch * m + j, mask=j < m, other=float("-inf"))[None, :]
        found = tl.max(logits, axis=1)
        larger = tl.where(found > top, found, top)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        top = larger
    if HAS_MASS:
        mass = tl.load(masses + batch * n + i, mask=i < n, other=0.0)
    else:
        mass = tl.full((ROWS,), 1.0, tl.float32) / n
    nothing = (mass == 0) | (total == 0)
    found = tl.log2(tl.where(mass == 0, 1.0, mass)) - (tl.log2(tl.where(total == 0, 1.0, total)) + top)
    tl.store(potentials + batch * n + i, tl.where(nothing, float("-inf"), found), mask=i < n)


@triton.jit
def _apply(
    x, y, x_scale, y_scale, f, g, values, moved, n, m, factor,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, VALUES: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """plan @ values of a block of rows, float32."""
    batch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(2) * OUT + tl.arange(0, OUT)
    row = tl.load(f + batch * n + i, mask=i < n, other=float("-inf"))
    total = tl.zeros((ROWS, OUT), tl.float32)
    for start in range(0, m, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        logits = factor * _logits(
            x + batch * n * WIDTH, y + batch * m * WIDTH, x_scale + batch * n, y_scale + batch * m, i, j, n, m,
            WIDTH, ROWS, COLUMNS, BLOCK, SCALED, PRECISION,
        )  # fmt: skip
        column = tl.load(g + batch * m + j, mask=j < m, other=float("-inf"))
        plan = tl.exp2(logits + row[:, None] + column[None, :])
        at = values + (batch * m + j[:, None]) * VALUES + c[None, :]
        value = tl.load(at, mask=(j < m)[:, None] & (c < VALUES)[None, :], other=0.0).to(tl.float32)
        total += tl.dot(plan, value, input_precision=PRECISION)
    place = moved + (batch * n + i[:, None]) * VALUES + c[None, :]
    tl.store(place, total, mask=(i < n)[:, None] & (c < VALUES)[None, :])


@triton.jit
def _sums(
    x, y, x_scale, y_scale, f, g, first, second, first_sums, second_sums, n, m, factor,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Sums over the columns of 2^(logits + f + g) times the weights `first`, and times `second` when BOTH."""
    batch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.load(f + batch * n + i, mask=i < n, other=float("-inf"))
    total, other_total = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, m, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        logits = factor * _logits(
            x + batch * n * WIDTH, y + batch * m * WIDTH, x_scale + batch * n, y_scale + batch * m, i, j, n, m,
            WIDTH, ROWS, COLUMNS, BLOCK, SCALED, PRECISION,
        )  # fmt: skip
        column = tl.load(g + batch * m + j, mask=j < m, other=float("-inf"))
        power = tl.exp2(logits + row[:, None] + column[None, :])
        total += tl.sum(power * tl.load(first + batch * m + j, mask=j < m, other=0.0)[None, :], axis=1)
        if BOTH:
            other_total += tl.sum(power * tl.load(second + batch * m + j, mask=j < m, other=0.0)[None, :], axis=1)
    tl.store(first_sums + batch * n + i, total, mask=i < n)
    if BOTH:
        tl.store(second_sums + batch * n + i, other_total, mask=i < n)


@triton.jit
def _token_gradient(
    x, y, x_scale, y_scale, f, g, left, right, left_values, right_values, out, batches, n, m, factor, n_iters,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, VALUES: tl.constexpr, VALUE_BLOCK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Sum over the columns of (gradient of the scores) * y, for a block of rows and OUT features.

    f (n_iters + 1, batch, n) and g (n_iters + 1, batch, m) end with the potentials of the plan; the gradient is
    plan * (left_values @ right_values') - sum over t of 2^(logits + f_t + g_t) * (left_t0 right_t0' + left_t1
    right_t1'), with left (n_iters, 2, batch, n) and right (n_iters, 2, batch, m).
    """
    batch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(2) * OUT + tl.arange(0, OUT)
    step_n, step_m = batches.to(tl.int64) * n, batches.to(tl.int64) * m
    total = tl.zeros((ROWS, OUT), tl.float32)
    for start in range(0, m, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        logits = factor * _logits(
            x + batch * n * WIDTH, y + batch * m * WIDTH, x_scale + batch * n, y_scale + batch * m, i, j, n, m,
            WIDTH, ROWS, COLUMNS, BLOCK, SCALED, PRECISION,
        )  # fmt: skip
        row = tl.load(f + n_iters * step_n + batch * n + i, mask=i < n, other=float("-inf"))
        column = tl.load(g + n_iters * step_m + batch * m + j, mask=j < m, other=float("-inf"))
        upper = _logits(
            left_values + batch * n * VALUES, right_values + batch * m * VALUES, x_scale, y_scale, i, j, n, m,
            VALUES, ROWS, COLUMNS, VALUE_BLOCK, False, PRECISION,
        )  # fmt: skip
        slope = tl.exp2(logits + row[:, None] + column[None, :]) * tl.where((j < m)[None, :], upper, 0.0)
        for step in range(n_iters):
            row_at, column_at = step * step_n + batch * n + i, step * step_m + batch * m + j
            row = tl.load(f + row_at, mask=i < n, other=float("-inf"))
            column = tl.load(g + column_at, mask=j < m, other=float("-inf"))
            row_at, column_at = row_at + step * step_n, column_at + step * step_m
            weight = tl.load(left + row_at, mask=i < n, other=0.0)[:, None]
            weight *= tl.load(right + column_at, mask=j < m, other=0.0)[None, :]
            other = tl.load(left + step_n + row_at, mask=i < n, other=0.0)[:, None]
            weight += other * tl.load(right + step_m + column_at, mask=j < m, other=0.0)[None, :]
            slope -= tl.exp2(logits + row[:, None] + column[None, :]) * weight
        if SCALED:
            slope *= tl.load(y_scale + batch * m + j, mask=j < m, other=0.0)[None, :]
        at = y + (batch * m + j[:, None]) * WIDTH + e[None, :]
        token = tl.load(at, mask=(j < m)[:, None] & (e < WIDTH)[None, :], other=0.0).to(tl.float32)
        total += tl.dot(slope, token, input_precision=PRECISION)
    place = out + (batch * n + i[:, None]) * WIDTH + e[None, :]
    tl.store(place, total, mask=(i < n)[:, None] & (e < WIDTH)[None, :])


def why_not(*, dtype, tol=None, started=False, **facts) -> str | None:
    """Why these kernels cannot serve a call on a CUDA tensor, or None."""
    if started:
        return "starts from potentials of zero only"
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
                torch.linalg.vector_norm(t, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(SHORTEST)
                for t in (self.x, self.y)
            ]
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

    def sides(self, swapped):
        sides = (self.y, self.x, *self.inverse[::-1]) if swapped else (self.x, self.y, *self.inverse)
        return sides, (self.m, self.n) if swapped else (self.n, self.m)

    def constants(self, rows, columns, features=BLOCK_FEATURES):
        return {
            "WIDTH": self.width, "ROWS": _at_most(self.tokens, rows), "COLUMNS": _at_most(self.tokens, columns),
            "BLOCK": _at_most(features, self.width), "SCALED": self.scaled, "PRECISION": self.precision,
            "num_warps": 4,
        }  # fmt: skip

    def launch(self, kernel, swapped, columns_of_grid, *arguments, features=BLOCK_FEATURES, **constants):
        sides, (rows, columns) = self.sides(swapped)
        common = self.constants(rows, columns, features)
        kernel[self.batch, triton.cdiv(rows, common["ROWS"]), columns_of_grid](
            *sides, *arguments, **common, **constants
        )

    def potential(self, swapped, masses, others, out):
        rows, columns = self.sides(swapped)[1]
        self.launch(
            _set_potential, swapped, 1, masses, others, out, rows, columns, self.factor,
            HAS_MASS=masses is not None, HAS_OTHERS=others is not None,
        )  # fmt: skip

    def iterate(self, a, b, n_iters):
        """Potentials f (n_iters, batch, n) and g (n_iters, batch, m)."""
        f = self.x.new_empty((n_iters, self.batch, self.n), dtype=torch.float32)
        g = self.x.new_empty((n_iters, self.batch, self.m), dtype=torch.float32)
        for step in range(n_iters):
            self.potential(False, a, g[step - 1] if step else None, f[step])
            self.potential(True, b, f[step], g[step])
        return f, g

    def moved(self, swapped, f, g, values):
        """plan @ values, or with `swapped` plan' @ values."""
        rows, columns = self.sides(swapped)[1]
        found = values.new_empty((self.batch, rows, values.shape[-1]), dtype=torch.float32)
        out = _at_most(MOST_VALUES // (1 if self.precision == "tf32" else 2), values.shape[-1])
        first, second = (g, f) if swapped else (f, g)
        self.launch(
            _apply, swapped, triton.cdiv(values.shape[-1], out), first, second, values, found, rows, columns,
            self.factor, VALUES=values.shape[-1], OUT=out,
        )  # fmt: skip
        return found

    def sums(self, swapped, f, g, first, second=None):
        rows, columns = self.sides(swapped)[1]
        found = [first.new_empty(self.batch, rows) for _ in range(1 if second is None else 2)]
        left, right = (g, f) if swapped else (f, g)
        self.launch(
            _sums, swapped, 1, left, right, first, second, found[0], found[-1], rows, columns, self.factor,
            BOTH=second is not None,
        )  # fmt: skip
        return found if second is not None else found[0]

    def token_gradient(self, swapped, f, g, left, right, left_values, right_values, eps):
        """The gradient of x, or with `swapped` of y, through the lengths of the tokens too."""
        rows, columns = self.sides(swapped)[1]
        tokens = self.y if swapped else self.x
        found = tokens.new_empty(tokens.shape, dtype=torch.float32)
        out = _at_most(BLOCK_GRADIENT, self.width)
        # Three products of TF32 hold three tiles for one: a whole block of features spills a few registers.
        features = BLOCK_FEATURES // 2 if self.precision == "tf32x3" else BLOCK_FEATURES
        arguments = (f, g, left, right, left_values, right_values)
        if swapped:
            arguments = (g, f, right, left, right_values, left_values)
        self.launch(
            _token_gradient, swapped, triton.cdiv(self.width, out), *arguments, found, self.batch, rows, columns,
            self.factor, left.shape[0], VALUES=left_values.shape[-1],
            VALUE_BLOCK=_at_most(features, left_values.shape[-1]), OUT=out, features=features,
        )  # fmt: skip
        found /= eps
        if self.lengths is None:
            return found
        lengths = self.lengths[int(swapped)]
        unit = tokens / lengths if self.scaled else tokens
        # A token that was lengthened to SHORTEST has a fixed divisor.
        along = (found * unit).sum(-1, keepdim=True) * unit
        return torch.where(lengths > SHORTEST, found - along, found) / lengths


def _marginals(a, b):
    return (None if mass is None else _flat(mass, 1) for mass in (a, b))


def forward(x, y, values, a, b, start, eps, n_iters, tol, similarity, return_error):
    """plan @ values, and the marginal error, None unless asked for."""
    shape = (*x.shape[:-1], values.shape[-1])
    if not math.prod(x.shape):
        return values.new_empty(shape), values.new_empty(shape[:-2], dtype=torch.float32)
    with torch.cuda.device_of(x):
        pair = _Pair(x, y, eps, similarity)
        mass, other_mass = _marginals(a, b)
        f, g = pair.iterate(mass, other_mass, n_iters)
        error = None
        if return_error:
            found = pair.sums(False, f[-1], g[-1], torch.ones_like(g[-1]))
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
        flat_a, flat_b = _marginals(a, b)
        grad, flat_values = _flat(grad, 2), _flat(values, 2)
        pair = _Pair(x, y, eps, similarity)
        f, g = pair.iterate(flat_a, flat_b, n_iters)
        grad_values = pair.moved(True, f[-1], g[-1], grad)
        start_f = (grad.float() * pair.moved(False, f[-1], g[-1], flat_values)).sum(-1)
        grad_g = (flat_values.float() * grad_values).sum(-1)
        left, right = f.new_ones(n_iters, 2, pair.batch, pair.n), g.new_ones(n_iters, 2, pair.batch, pair.m)
        powers = torch.empty_like(g)
        grad_a, grad_b = torch.zeros_like(f[0]), torch.zeros_like(g[0])
        mass_a = 1 / pair.n if flat_a is None else flat_a
        mass_b = 1 / pair.m if flat_b is None else flat_b
        for step in reversed(range(n_iters)):
            # See _two_plans and _undo of Sinkhorn's kernels: the same steps on vectors.
            before = g[step - 1] if step else torch.zeros_like(g[0])
            powers[step] = torch.maximum(g[step], before)
            base = powers[step].masked_fill(powers[step] == -torch.inf, 0)
            share = torch.where(g[step] == -torch.inf, 0, grad_g / mass_b)
            grad_b += share
            torch.mul(torch.exp2(g[step] - base), share, out=right[step, 0])
            torch.exp2(before - base, out=right[step, 1])
            product, found = pair.sums(False, f[step], powers[step], right[step, 0], right[step, 1])
            gradient = start_f - product if step == n_iters - 1 else -product
            nothing = f[step] == -torch.inf
            grad_a += torch.where(nothing, 0, gradient / mass_a)
            left[step, 1] = torch.where(nothing, 0, gradient / found)
            grad_g = -right[step, 1] * pair.sums(True, f[step], powers[step], left[step, 1])
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
