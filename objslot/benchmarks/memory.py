"""Peak memory of a call, in a process of its own.

On the CPU: the growth of the resident set while the call runs, in a child that is forked for it and has made the call
once before, in a thread that has ended, so that libraries are loaded and code is compiled but neither a workspace nor
a result is kept from that call. Inputs are not counted, results are. On CUDA: the allocator's peak over what was held
before.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from objslot.benchmarks import checking
from objslot.benchmarks.problem import Operation, Problem
from objslot.ops import _native

CLEAR_PEAK = "5"


def call_of(operation: Operation, problem: Problem, name: str, mode: str) -> Callable[[], object]:
    """The pass of objslot or of the peer of this name."""
    peers = {peer.name: peer for peer in operation.peers}
    call = problem.ours if name == "objslot" else peers[name].build(problem)
    run = checking.forward if mode == "forward" else checking.both
    return lambda: run(call, problem)


def cuda_peak(call: Callable[[], object]) -> int:
    """Bytes that `call` holds at most on top of what is there."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Measurer:
    """On the CPU a process without threads that forks a child for each measurement; use it as a context."""

    def __init__(self, device: torch.device):
        self.device, self._process = device, None

    def __enter__(self) -> "Measurer":
        if self.device.type == "cpu":
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        return self

    def __exit__(self, *failure) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()

    def peak(self, operation: Operation, sizes: Sequence[int], record: dict, name: str, mode: str) -> int | None:
        """Bytes of the contestant's pass with the dtype and threads of a record; None when it failed."""
        call = None
        if self._process is None:
            problem = operation.build(sizes, self.device, getattr(torch, record["dtype"]))
            call = call_of(operation, problem, name, mode)
        request = {"operation": operation.name, "sizes": list(sizes), "name": name, "mode": mode}
        return self.peak_of(request | {part: record[part] for part in ("dtype", "threads")}, call)

    def peak_of(self, request: dict, call: Callable[[], object] | None) -> int | None:
        """Bytes of `call` on CUDA, on the CPU of what the request describes to the other process."""
        if self._process is None:
            return cuda_peak(call)
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def cpu_peak(call: Callable[[], object]) -> int:
    """Bytes by which the resident set grows at most while `call` runs the second time."""
    first = threading.Thread(target=call)
    first.start()
    first.join()
    gc.collect()
    native = _native.load()
    if native is not None:
        native.release_results()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write(CLEAR_PEAK)
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def _serve() -> None:
    # Loaded once, before the first child is forked.
    import_module("objslot.benchmarks.suite")
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            answer = b"null"
            try:
                answer = str(_measure(json.loads(line))).encode()
            finally:
                os.write(writer, answer)
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        print(answer or "null", flush=True)


def _measure(request: dict) -> int:
    from objslot.benchmarks import registry, suite


    torch.set_num_threads(request["threads"])
    # Worker processes of the compiler would outlive the child.
    torch._inductor.config.compile_threads = 1
    if suite.TRAINING_STEP in request:
        from objslot.benchmarks import training_step

        return cpu_peak(training_step.step_call(torch.device("cpu"), request))
    operation = registry.OPERATIONS[request["operation"]]
    problem = operation.build(request["sizes"], torch.device("cpu"), getattr(torch, request["dtype"]))
    return cpu_peak(call_of(operation, problem, request["name"], request["mode"]))


if __name__ == "__main__":
    _serve()
