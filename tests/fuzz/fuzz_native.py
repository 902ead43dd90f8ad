"""Coverage-guided calls of the compiled module: `.ci/sanitize fuzzer` builds it for this and starts it.

An input becomes an op on drawn sizes, layouts, values and options, forwards and backwards; the address sanitizer
ends the process where a kernel leaves the memory of a tensor. Where the input says so, one number that the module is
handed, a size, a stride or an address, gives way to one that no tensor has. The module refuses it or does without:
what it may not do is crash.
"""

import sys
from pathlib import Path

import atheris
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from op_cases import DTYPES, OPS, noise
from slot_cases import evaluate
from test_bindings import Recorder, numbers, replaced
from test_properties import SIZES, WIDTHS, cases
from test_slot_half import arguments as half_arguments
from test_slot_half import run as half
from test_slot_loop import call as slot_loop
from test_slot_loop import problem as slot_loop_problem

from objslot.ops import _native
from objslot.ops.transport import alignment

# The number of iterations may be anything: a large one only takes its time.
ITERATIONS = {("SinkhornProblem", (10,)), ("TransportProblem", (9,)), ("align_frames", (8,))}
REFUSALS = (ValueError, TypeError, OverflowError, MemoryError)
LARGE = st.integers(2**57, 2**64 - 1)
NEGATIVE = st.integers(-(2**63), -1)


class Replacing:
    """Offers a call again with another number in one place, drawn the first time that a call has one there."""

    def __init__(self, data):
        self._data = data
        self._calls = data.draw(st.integers(0, 7))
        self.done = False

    def __call__(self, name, function, arguments):
        self._calls -= 1
        held = list(numbers(arguments))
        if self._calls >= 0 or self.done or not held:
            return
        self.done = True
        place, value = self._data.draw(st.sampled_from(held))
        choices = NEGATIVE if (name, place) in ITERATIONS else NEGATIVE | LARGE
        if value > 2**32:
            choices |= st.sampled_from([value + 1, value - 1])
        try:
            function(*replaced(arguments, place, self._data.draw(choices)))
        except REFUSALS:
            pass


def drawn_call(data):
    """An op on tensors of any kind, without arguments left to give."""
    name = data.draw(st.sampled_from([*OPS, "alignment", "slot_loop", "slot_loop_half"]))
    dtype = data.draw(st.sampled_from(DTYPES))
    if name.startswith("slot_loop"):
        small = st.integers(1, 4)
        sizes = [data.draw(draw) for draw in (small, small, WIDTHS, SIZES, WIDTHS, WIDTHS, WIDTHS)]
        kind = {"gru": data.draw(st.booleans()), "masked": data.draw(st.booleans())}
        if name == "slot_loop_half":
            assume(native.multiplies_on_tiles())
            tensors = half_arguments(sizes, **kind)
            return lambda: half(*tensors, iterations=data.draw(small))
        assume(dtype in (torch.float32, torch.float64))
        tensors = slot_loop_problem(sizes, **kind)
        tensors = [None if x is None else x.to(dtype) for x in tensors]
        return lambda: evaluate(slot_loop("cpu", iterations=data.draw(small)), tensors)
    if name == "alignment":
        drawn = (st.integers(0, 3), st.integers(1, 4), SIZES, WIDTHS, WIDTHS)
        clips, frames, n, d, c = (data.draw(draw) for draw in drawn)
        masses = noise(3, clips, frames, n).softmax(-1).to(dtype) if data.draw(st.booleans()) else None
        tokens, values = noise(1, clips, frames, n, d).to(dtype), noise(2, clips, frames, n, c).to(dtype)
        return lambda: alignment(tokens, values, masses, n_iters=data.draw(st.integers(1, 4)), backend="cpu")
    case = data.draw(cases(name, dtype))
    # None: without the dispatcher, where slot attention keeps its softmax.
    backend = data.draw(st.sampled_from(["cpu", None]))
    return lambda: case.run(backend=backend)


native = _native.load()


@settings(database=None)
@given(data=st.data())
def call(data):
    action = drawn_call(data)
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    recorder = Recorder(Replacing(data)) if data.draw(st.booleans()) else native
    _native.load = lambda: recorder
    action()


if __name__ == "__main__":
    atheris.Setup(sys.argv, call.hypothesis.fuzz_one_input)
    atheris.Fuzz()
