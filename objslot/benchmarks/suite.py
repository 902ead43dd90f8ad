"""The jobs of a run, in order: timings, memory, scaling and the training step."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from objslot.benchmarks import memory, runner, scaling
from objslot.benchmarks.problem import Operation, write_shape
from objslot.errors import UserError

# The one operation that is no function of tensors: see training_step.py.
TRAINING_STEP, WHOLE_STEP = "training_step", "whole step"
AUTHORS, AUTHORS_LEARNING = "authors' formulation", "authors' formulation, encoder learns, float32"

# Seconds of rounds for one mode of one shape.
BUDGET, BUDGET_QUICK, BUDGET_SCALING = 1.0, 0.4, 0.3


@dataclass(frozen=True)
class Plan:
    """What a run covers.

    Args:
        device: where.
        threads: numbers of threads of the timings; memory and scaling take the first.
        quick: small shapes, float32, eager peers and what else need not be compiled.
        shapes: instead of the registered ones; timings alone then.
        dtypes: instead of the registered ones.
        modes: of `runner.MODES`.
        peers: words, one of which the name of a peer must contain; None for all.
        budget: seconds of rounds for one mode of one shape; None for the default.
    """

    device: torch.device
    threads: Sequence[int]
    quick: bool = False
    shapes: Sequence[tuple[int, ...]] | None = None
    dtypes: Sequence[str] | None = None
    modes: Sequence[str] = runner.MODES
    peers: Sequence[str] | None = None
    budget: float | None = None

    def wants(self, name: str) -> bool:
        if self.quick and "compiled" in name:
            return False
        return self.peers is None or any(word in name for word in self.peers)


@dataclass(frozen=True)
class Job:
    """A part of a run that is done or not: its name, unique in the run, and what makes its records."""

    name: str
    run: Callable[[], Iterator[dict]]


def default_threads(device: torch.device) -> list[int]:
    """All threads that torch would use, then one; on CUDA the first alone."""
    everything = torch.get_num_threads()
    return [everything] if device.type == "cuda" or everything == 1 else [everything, 1]


def jobs(operations: Sequence[Operation], plan: Plan, *, training: bool) -> list[Job]:
    """The jobs of a plan; `training` adds the training step. Raises `UserError` for shapes that do not fit."""
    found = [job for operation in operations for job in _timings(operation, plan)]
    if plan.shapes is None and not plan.quick:
        found += [job for operation in operations for job in _memory(operation, plan)]
        found += [job for operation in operations for job in _scaling(operation, plan)]
    if training:
        # It needs the training package, which the ops do without.
        try:
            from objslot.benchmarks import training_step
        except ImportError as missing:
            record = {"kind": "time", "operation": TRAINING_STEP, "name": runner.OURS, "status": runner.MISSING}
            record |= {"note": str(missing), "mode": WHOLE_STEP, "shape": "", "sizes": {}, "dtype": "float32"}
            record |= {"threads": plan.threads[0], "device": plan.device.type}
            return [*found, Job(TRAINING_STEP, lambda: iter([record]))]
        found += training_step.jobs(plan)
    return found


def _timings(operation: Operation, plan: Plan) -> Iterator[Job]:
    shapes = plan.shapes or (operation.quick if plan.quick else operation.shapes)
    for sizes in shapes:
        if len(sizes) != len(operation.axes) or min(sizes) < 1:
            raise UserError(
                f"shapes: {operation.name} expects {'x'.join(operation.axes)}, got {write_shape(sizes)}"
            )
    known = ("float32",) if plan.quick else operation.dtypes
    for place, sizes in enumerate(shapes):
        for dtype, threads in itertools.product(plan.dtypes or known, plan.threads):
            # The first shape is measured in every way, the others in float32 with all threads.
            if plan.shapes is None and place > 0 and (dtype != "float32" or threads != plan.threads[0]):
                continue
            if plan.dtypes is None and dtype != "float32" and threads != plan.threads[0]:
                continue
            wanted = plan.wants
            if plan.shapes is None:
                wanted = partial(_takes_part, plan, place == 0 and dtype == "float32", threads == plan.threads[0])
            run = partial(
                runner.run, operation, sizes, device=plan.device, dtype=getattr(torch, dtype), threads=threads,
                budget=plan.budget or (BUDGET_QUICK if plan.quick else BUDGET), wanted=wanted, modes=plan.modes,
            )  # fmt: skip
            yield Job(f"time {operation.name} {write_shape(sizes)} {dtype} {threads}", run)


def _takes_part(plan: Plan, first: bool, all_threads: bool, name: str) -> bool:
    """On the CPU most of a run would go into building code: max-autotune takes the longest and changes matrix
    products alone, so it has the `first` shape; with one thread peers run eager.
    """
    if not plan.wants(name) or plan.device.type == "cuda":
        return plan.wants(name)
    if "max-autotune" in name:
        return first and all_threads
    return all_threads or "compiled" not in name


def _memory(operation: Operation, plan: Plan) -> Iterator[Job]:
    sizes = operation.shapes[0]
    yield Job(f"memory {operation.name} {write_shape(sizes)}", partial(_peaks, operation, sizes, plan))


def _peaks(operation: Operation, sizes: Sequence[int], plan: Plan) -> Iterator[dict]:
    """The peak of objslot, of every eager peer and of those compiled in the default mode."""
    base = runner.base_record("memory", operation, sizes, plan.device, torch.float32, plan.threads[0])
    problem = operation.build(sizes, plan.device, torch.float32)
    names = [runner.OURS] + [
        peer.name
        for peer in operation.peers
        if plan.wants(peer.name)
        and peer.compiled in (None, "default")
        and peer.missing() is None
        and peer.refuses(problem) is None
    ]
    mode = "forward+backward" if problem.gradients else "forward"
    with memory.Measurer(plan.device) as measurer:
        for name in names:
            yield {**base, "mode": mode, "name": name, "peak_bytes": measurer.peak(operation, sizes, base, name, mode)}


def _scaling(operation: Operation, plan: Plan) -> Iterator[Job]:
    for axis, shapes in operation.scaling.items():
        yield Job(f"scaling {operation.name} {axis}", partial(_growth, operation, axis, shapes, plan))


def _growth(operation: Operation, axis: str, shapes: Sequence[tuple[int, ...]], plan: Plan) -> Iterator[dict]:
    """Points of objslot and of the first peer, which is eager, along one axis."""
    first = operation.peers[0].name
    points = {runner.OURS: [], first: []}
    with memory.Measurer(plan.device) as measurer:
        for sizes in shapes:
            rows = runner.run(
                operation, sizes, device=plan.device, dtype=torch.float32, threads=plan.threads[0],
                budget=BUDGET_SCALING, wanted=lambda name: name == first,
            )  # fmt: skip
            rows = [row for row in rows if row["mode"] == operation.widest_mode]
            for row in rows:
                peak = None
                if "seconds" in row:
                    peak = measurer.peak(operation, sizes, row, row["name"], row["mode"])
                points[row["name"]].append(
                    {
                        "size": dict(zip(operation.axes, sizes, strict=True))[axis],
                        "status": row["status"],
                        "seconds": row["seconds"]["median"] if "seconds" in row else None,
                        "peak_bytes": peak,
                    }
                )
    base = runner.base_record("scaling", operation, shapes[0], plan.device, torch.float32, plan.threads[0])
    for name, found in points.items():
        yield {**base, "mode": operation.widest_mode, "axis": axis, "name": name, **scaling.summary(found)}
