"""Every backend of every op against the reference in float64, on the user's own device, and beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from objslot import ops
from objslot.benchmarks.timing import measure, paired_ratio
from objslot.ops import _proof
from objslot.ops._backends import BACKENDS, explain, row_of

# A backend may be this many times as far from float64 as plain PyTorch in the same dtype is, plus a rounding.
ERROR_RATIO = 2.0
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TIMED = 1
"""Which of an op's cases is timed."""
_SECONDS = 0.2
"""How long a backend and plain PyTorch are timed, in turns."""


@dataclass(frozen=True)
class Case:
    """Arguments of an op: sizes of normally distributed tensors, of masks and labels from 0 to 1, and options."""

    normal: Sequence[tuple[int, ...]]
    uniform: Sequence[tuple[int, ...]] = ()
    options: dict = field(default_factory=dict)

    def arguments(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """The same at every call, but for rounding to `dtype`; bfloat16 holds them as exactly as the others."""
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(size, generator=generator) for size in self.normal]
        drawn += [torch.rand(size, generator=generator) for size in self.uniform]
        return [tensor.bfloat16().to(device, dtype) for tensor in drawn]


# An odd small one, one of a usual size, which is timed, and one beyond what a GPU's block of threads holds.
CASES: dict[str, tuple[Case, ...]] = {
    "sinkhorn": tuple(Case([size], options={"eps": 0.1}) for size in ((2, 33, 47), (4, 196, 196), (1, 259, 391))),
    "sinkhorn_transport": tuple(
        Case([(b, n, d), (b, m, d), (b, m, c)], options={"eps": 0.1})
        for b, n, m, d, c in ((2, 33, 47, 24, 5), (4, 196, 196, 384, 16), (1, 259, 391, 64, 16))
    ),
    "slot_softmax": tuple(
        Case([(b, g, p, n)], [(b, g, n)]) for b, g, p, n in ((2, 3, 4, 65), (8, 16, 4, 256), (1, 1, 7, 1620))
    ),
    "slot_attention": tuple(
        Case([(b, g, p, d), (b, n, d), (b, n, e)], [(b, g, n)])
        for b, g, p, n, d, e in ((2, 3, 4, 65, 24, 17), (2, 16, 4, 256, 384, 384), (1, 1, 16, 1620, 64, 64))
    ),
    "assign": (Case([(9, 4, 4)]), Case([(512, 4, 4)]), Case([(3, 7, 9)])),
    "propagate": tuple(
        Case(
            [(1, h, w, d), (1, t, h, w, d)],
            [(1, t, h, w, 4)],
            {"radius": radius, "topk": 5, "temperature": 0.2},
        )
        for h, w, d, t, radius in ((6, 7, 16, 3, 3), (9, 16, 384, 2, 5), (7, 9, 64, 2, 20))
    ),
}
CASES["sinkhorn_potentials"] = CASES["sinkhorn"]


def checks(device: torch.device) -> Iterator[dict]:
    """One result an op and backend on `device`: {"op", "backend", "device", "error", "allowed", "passed", "times"}.

    "error" is the relative error of an output or gradient against the reference in float64, "allowed" is ERROR_RATIO
    times that of the reference in the same dtype, plus a rounding: both of the case and dtype, among all that the
    backend serves, where the one is the largest part of the other. "times" is how many times as fast as plain PyTorch
    the backend is, forward and backward, in float32; None for plain PyTorch itself. A backend that raises has "failure"
    in place of these three.
    """
    for name, cases in CASES.items():
        check = _Check(getattr(ops, name), cases, device)
        for backend in BACKENDS:
            result = {"op": name, "backend": backend, "device": device.type}
            try:
                worst = check.worst(backend)
                if worst is None:
                    continue
                times = check.times(backend)
            except Exception as failure:
                yield {**result, "failure": f"{type(failure).__name__}: {failure}", "passed": False}
                continue
            error, allowed = worst
            yield {**result, "error": error, "allowed": allowed, "passed": error <= allowed, "times": times}


def keep(device: torch.device, results: Sequence[dict]) -> None:
    """Let the backends that were right, and faster than plain PyTorch, serve by themselves on devices like this one.

    Raises OSError where the user's cache folder cannot be written.
    """
    good: dict[tuple[str, str], bool] = {}
    for result in results:
        pair = row_of(getattr(ops, result["op"])), result["backend"]
        good[pair] = good.get(pair, True) and result["passed"] and (result["times"] or 0) > 1
    _proof.record(device, [pair for pair, fine in good.items() if fine])


class _Check:
    """One op on one device. The reference is the first backend checked, and sets what the others are allowed."""

    def __init__(self, function: Callable, cases: Sequence[Case], device: torch.device):
        self.function, self.cases, self.device = function, cases, device
        self._exact: dict[int, list[Tensor]] = {}
        self._allowed: dict[tuple[int, torch.dtype], float] = {}

    def worst(self, backend: str) -> tuple[float, float] | None:
        """Error and what is allowed; None where the backend serves no case."""
        found = []
        for place, case in enumerate(self.cases):
            for dtype in _DTYPES:
                arguments = case.arguments(self.device, dtype)
                if explain(self.function, *arguments, **case.options, backend=backend).chosen is None:
                    continue
                if place not in self._exact:
                    precise = case.arguments(torch.device("cpu"), torch.float64)
                    self._exact[place] = self._run(case, precise, "reference")
                outputs = self._run(case, arguments, backend)
                error = max(_relative_error(*pair) for pair in zip(outputs, self._exact[place], strict=True))
                allowed = self._allowed.setdefault((place, dtype), ERROR_RATIO * error + torch.finfo(dtype).eps)
                found.append((error, allowed))
        return max(found, key=lambda pair: pair[0] / pair[1], default=None)

    def times(self, backend: str) -> float | None:
        """How many times as fast as plain PyTorch; None for that, and where the timed case is not served."""
        case = self.cases[_TIMED]
        arguments = case.arguments(self.device, torch.float32)
        chosen = explain(self.function, *arguments, **case.options, backend=backend).chosen
        if backend == "reference" or chosen is None:
            return None
        calls = {name: partial(self._run, case, arguments, name) for name in ("reference", backend)}
        samples = measure(calls, _SECONDS, self.device)
        ratio = paired_ratio(samples["reference"], samples[backend])
        return None if ratio is None else ratio.median

    def _run(self, case: Case, arguments: list[Tensor], backend: str) -> list[Tensor]:
        """The outputs and, where there are any, the gradients of a fixed weighted sum of the outputs."""
        arguments = [argument.detach().requires_grad_() for argument in arguments]
        outputs = self.function(*arguments, **case.options, backend=backend)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        smooth = [output for output in outputs if output.requires_grad]
        if not smooth:
            return outputs
        weights = [torch.linspace(0, 1, output.numel()).view(output.shape).to(output) for output in smooth]
        gradients = torch.autograd.grad(smooth, arguments, weights, allow_unused=True)
        return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


def _relative_error(found: Tensor, exact: Tensor) -> float:
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((found.detach().cpu().double() - exact.detach().double()).abs().max() / scale).item()
    return error if error == error else float("inf")
