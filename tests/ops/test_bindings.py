"""The compiled module called with sizes, strides and addresses that no tensor has: it refuses, it never crashes.

Real calls are recorded; then one number of a call at a time is replaced, in a forked child that may die.
"""

import os
import random
import signal
import time

import pytest
import torch
from op_cases import OPS, make, noise
from slot_cases import evaluate, soft_mask
from test_slot_half import arguments as half_arguments
from test_slot_half import run as half
from test_slot_loop import call as slot_loop
from test_slot_loop import problem as slot_loop_problem

from objslot.ops import _native, slot_attention
from objslot.ops.transport import alignment

native = _native.load()
pytestmark = pytest.mark.skipif(native is None, reason="the compiled module was not built")

# Options whose value may be anything: told from sizes by these values.
ITERATIONS, RADIUS = 13, 3
FREE = {ITERATIONS}
OPTIONS = {
    "sinkhorn": {"n_iters": ITERATIONS},
    "sinkhorn_potentials": {"n_iters": ITERATIONS},
    "sinkhorn_transport": {"n_iters": ITERATIONS},
    "propagate": {"radius": RADIUS, "topk": 5, "temperature": 0.2},
}
REFUSED, RETURNED = 7, 8
# What calls kernels of its own besides the ops that users call.
CALLS = (
    *OPS,
    "alignment",
    "slot_loop",
    "slot_attention_kept",
    pytest.param(
        "slot_loop_half",
        marks=pytest.mark.skipif(
            native is None or not native.multiplies_on_tiles(), reason="its kernels multiply on tiles"
        ),
    ),
)


def run(name, dtype):
    """An op forwards and backwards, on tensors with more than one entry in every dimension."""
    if name == "slot_loop_half":
        half(*half_arguments((2, 2, 3, 9, 4, 5, 6), masked=True), iterations=2)
    elif name == "slot_loop":
        inputs = [x.to(dtype) for x in slot_loop_problem((2, 2, 3, 9, 4, 5, 6), masked=True)]
        evaluate(slot_loop("cpu", iterations=2), inputs)
    elif name == "slot_attention_kept":
        rows = noise(1, 2, 2, 3, 130), noise(2, 2, 9, 130), noise(3, 2, 9, 130), soft_mask(2, 2, 9)
        evaluate(slot_attention, [x.to(dtype) for x in rows])
    elif name == "alignment":
        tokens, values, masses = noise(1, 2, 3, 5, 4), noise(2, 2, 3, 5, 6), noise(3, 2, 3, 5).softmax(-1)
        alignment(*(x.to(dtype) for x in (tokens, values, masses)), n_iters=ITERATIONS, backend="cpu")
    else:
        sizes, masses, layouts = (5, 6, 4, 3, 2), ("normal", "normal"), ["contiguous"] * 5
        make(name, (2,), sizes, "normal", masses, layouts, dtype, 1, **OPTIONS.get(name, {})).run(backend="cpu")


class Recorder:
    """Stands for the module: every call is done as it is, and offered to ``attack`` while its memory is alive."""

    def __init__(self, attack):
        self._attack = attack

    def __getattr__(self, name):
        function = getattr(native, name)

        def call(*arguments):
            self._attack(name, function, arguments)
            return function(*arguments)

        return call


def numbers(arguments, place=()):
    """Where the whole numbers of a call are, in lists too."""
    for index, value in enumerate(arguments):
        if isinstance(value, list | tuple):
            yield from numbers(value, (*place, index))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*place, index), value


def replaced(arguments, place, value):
    given = list(arguments)
    given[place[0]] = value if len(place) == 1 else replaced(given[place[0]], place[1:], value)
    return given


def outcome(function, arguments) -> int:
    """Exit status of a child that makes the call: REFUSED, RETURNED, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
            code = RETURNED
        except (ValueError, TypeError, OverflowError, MemoryError):
            code = REFUSED
        except BaseException:
            code = 1
        os._exit(code)
    deadline = time.monotonic() + 20
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return RETURNED
        time.sleep(0.0005)


def mutants(value):
    """(replacement, whether it has to be refused): an address off its alignment, or a size out of all bounds."""
    if value > 2**32:
        return [(value + 1, True), (2**64 - 1, True), (2**64 - 64, True)]
    # Zero may be an address that is left out: any aligned one could take its place.
    return [(-1, True), (-(2**63), True)] + ([(2**62, value not in FREE)] if value else [])


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_numbers_that_no_tensor_has_are_refused(op, dtype, monkeypatch, one_thread, request):
    if op == "slot_loop" and dtype == torch.float16:
        pytest.skip("its kernels take no half precision")
    if op == "slot_loop_half" and dtype != torch.float16:
        pytest.skip("its kernels are of bfloat16 alone")
    draw, failures, attacks = random.Random(0), [], [0]
    # A fork of a sanitized process takes a tenth of a second.
    share = 1.0 if request.config.getoption("--nightly") else 0.1 if "OBJSLOT_SANITIZED" in os.environ else 0.35

    def attack(name, function, arguments):
        for place, value in numbers(arguments):
            for replacement, must in mutants(value):
                if attacks[0] > 1 and draw.random() > share:
                    continue
                attacks[0] += 1
                code = outcome(function, replaced(arguments, place, replacement))
                if code != REFUSED and not (code == RETURNED and not must):
                    failures.append((name, place, value, replacement, code))

    monkeypatch.setattr(_native, "load", lambda: Recorder(attack))
    run(op, dtype)
    assert attacks[0] > 1
    assert not failures, f"{len(failures)} of {attacks[0]}: {failures[:8]}"


@pytest.mark.parametrize("op", CALLS)
def test_every_address_left_out_is_refused_or_not_wanted(op, monkeypatch, one_thread):
    """Null where memory is needed is an error, null where it is not is no crash."""
    failures = []

    def attack(name, function, arguments):
        for place, value in numbers(arguments):
            if value > 2**32:
                code = outcome(function, replaced(arguments, place, 0))
                if code not in (REFUSED, RETURNED):
                    failures.append((name, place, code))

    monkeypatch.setattr(_native, "load", lambda: Recorder(attack))
    run(op, torch.float32)
    assert not failures, failures


def test_a_number_of_threads_below_one_is_refused():
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        native.assign(
            torch.zeros(1, 2, 2, dtype=torch.float64).data_ptr(),
            1,
            2,
            2,
            torch.zeros(1, 2, dtype=torch.int64).data_ptr(),
            0,
        )
