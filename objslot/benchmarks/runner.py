"""Runs the contestants of a problem: check, then time, and one record for each of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from objslot.benchmarks import checking, limits
from objslot.benchmarks.problem import Call, Operation, Problem, write_shape
from objslot.benchmarks.timing import Samples, measure, paired_ratio
from objslot.errors import BackendError
from objslot.ops import use_backend

OURS = "objslot"
MODES = ("forward", "forward+backward")

# What a record's "status" says.
OK = "ok"
OTHER = "other result"
IMPRECISE = "less exact"
WRONG = "wrong"
MISSING = "missing"
REFUSED = "not applicable"
FAILED = "failed"


@dataclass(frozen=True)
class Contestant:
    """A callable that ran, with its errors forward and, where there are gradients, forward and backward."""

    name: str
    call: Call
    errors: dict[str, float]
    other: str | None = None


class Named(nn.Module):
    """objslot's call on a backend asked for by name."""

    def __init__(self, call: Call, backend: str):
        super().__init__()
        self.call, self.backend = call, backend

    def forward(self, *tensors):
        with use_backend(self.backend):
            return self.call(*tensors)


def run(
    operation: Operation,
    sizes: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    budget: float,
    wanted: Callable[[str], bool] = lambda name: True,
    modes: Sequence[str] = MODES,
) -> Iterator[dict]:
    """Records of one shape: objslot's first, then those of the peers that `wanted` names, for every mode.

    A contestant whose result is off has no "seconds". `budget` is the time of the rounds of one mode, in seconds.
    """
    torch.set_num_threads(threads)
    # Code compiled for other threads, dtypes and shapes counts against the limit of recompilations.
    torch._dynamo.reset()
    problem = operation.build(sizes, device, dtype)
    base = base_record("time", operation, sizes, device, dtype, threads)
    modes = [mode for mode in modes if mode == "forward" or operation.differentiable]
    exact = checking.Exact.of(problem)
    plain = exact.errors(problem.plain, problem)
    bounds = {mode: checking.bound(plain[mode], dtype) for mode in modes}

    found, idle = [], []
    for name, other, make, absent in _entrants(operation, problem, wanted):
        if absent is not None:
            idle.append({"name": name, **absent})
            continue
        try:
            call = make()
            found.append(Contestant(name, call, exact.errors(call, problem), other))
        except BackendError as refusal:
            idle.append({"name": name, "status": REFUSED, "note": str(refusal)})
        except Exception as failure:
            idle.append({"name": name, **_failed(failure)})
    del exact
    for mode in modes:
        yield from _timed(base, mode, problem, found, bounds[mode], budget)
        yield from ({**base, "mode": mode, **row} for row in idle)


def base_record(
    kind: str, operation: Operation, sizes: Sequence[int], device: torch.device, dtype: torch.dtype, threads: int
) -> dict:
    """What all records of one shape share."""
    return {
        "kind": kind,
        "operation": operation.name,
        "shape": write_shape(sizes),
        "sizes": dict(zip(operation.axes, sizes, strict=True)),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
    }


def _entrants(operation: Operation, problem: Problem, wanted: Callable[[str], bool]):
    """Name, label, maker and, where it takes no part, the reason of everybody; objslot first."""
    yield OURS, None, lambda: problem.ours, None
    if problem.device.type == "cuda":
        # Kernels that are not chosen by themselves until they were seen right.
        for backend in ("triton", "cuda"):
            yield f"{OURS}, {backend} by name", None, lambda backend=backend: Named(problem.ours, backend), None
    for peer in operation.peers:
        if not wanted(peer.name):
            continue
        absent = None
        if (missing := peer.missing()) is not None:
            absent = {"status": MISSING, "note": missing}
        elif (reason := peer.refuses(problem)) is not None:
            absent = {"status": REFUSED, "note": reason}
        yield peer.name, peer.other, lambda peer=peer: peer.build(problem), absent


def _failed(failure: Exception) -> dict:
    words = " ".join(str(failure).split())[:200]
    return {"status": FAILED, "note": f"{type(failure).__name__}: {words}"}


def _status(contestant: Contestant, error: float, bound: float) -> str:
    if error <= bound:
        return OK
    if contestant.other is not None and error < float("inf"):
        return OTHER
    # Nobody gains by a rival that is left out for a rounding too many.
    rounding = checking.RIVAL_RATIO * bound
    return IMPRECISE if contestant.name != OURS and error <= rounding else WRONG


def _timed(
    base: dict, mode: str, problem: Problem, found: Sequence[Contestant], bound: float, budget: float
) -> Iterator[dict]:
    rows, calls = {}, {}
    for contestant in found:
        error = contestant.errors[mode]
        status = _status(contestant, error, bound)
        rows[contestant.name] = {
            "name": contestant.name,
            "status": status,
            "note": contestant.other if status == OTHER else "",
            "error": error if error < float("inf") else None,
            "bound": bound,
        }
        if status == WRONG:
            continue
        try:
            call = _call(contestant.call, problem, mode)
            call()
        except Exception as failure:
            rows[contestant.name] |= _failed(failure)
        else:
            calls[contestant.name] = call
    work = problem.work if mode == "forward" else problem.work.backward
    copy = limits.copy(work.bytes, problem.device)
    samples = measure({**calls, "copy": copy}, budget, problem.device)
    limit = limits.least(work, samples["copy"].quartiles.median, problem.device, problem.dtype, base["threads"])
    for name, row in rows.items():
        record = {**base, "mode": mode, **row}
        if name in calls:
            record.update(_figures(samples[name], samples.get(OURS), name, limit))
        yield record


def _figures(own: Samples, ours: Samples | None, name: str, limit: dict) -> dict:
    first = Samples(own.first)
    figures = {"seconds": asdict(own.quartiles), "samples": own.taken, "dropped": own.dropped}
    figures["first"] = {"seconds": asdict(first.quartiles)}
    if name == OURS:
        return {**figures, "limit": limit, "distance": own.quartiles.median / limit["seconds"]}
    if ours is None or (ratio := paired_ratio(own, ours)) is None:
        return figures
    if (of_first := paired_ratio(first, Samples(ours.first))) is not None:
        figures["first"]["ratio"] = asdict(of_first)
    return {**figures, "ratio": asdict(ratio)}


def _call(call: Call, problem: Problem, mode: str) -> Callable[[], object]:
    if mode == "forward":

        def once():
            with torch.no_grad():
                return call(*problem.tensors)

        return once
    tensors = checking.leaves(problem)
    with torch.enable_grad():
        upper = checking.cotangents([part for part in checking.outputs(call(*tensors)) if part.requires_grad])
    return lambda: checking.both(call, problem, upper)
