"""Many threads, and processes forked among them."""

import concurrent.futures
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adversarial_cases import BACKENDS, EVERY, assert_alike, assert_same, case


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_bits_on_every_call_and_for_any_number_of_threads(op, backend, dtype):
    sizes = [(17, 33, 7, 5, 2), (130, 140, 24, 9, 3)]
    before = torch.get_num_threads()
    try:
        for size in sizes:
            plain = case(op, dtype, sizes=size)
            torch.set_num_threads(1)
            wanted = plain.run(backend=backend)
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                found = plain.run(backend=backend)
                assert_same(plain.run(backend=backend), found)
                assert_alike(op, backend, found, wanted)
    finally:
        torch.set_num_threads(before)


def test_many_python_threads_at_once():
    """Different shapes and ops at the same time: workspaces are not shared."""
    jobs = [
        (case(op, dtype, sizes=(n, 33, 7, 5, 2), seed=n), backend)
        for op, backend in BACKENDS
        if backend == "cpu"
        for n in (3, 40)
        for dtype in (torch.float32, torch.float64)
    ]
    wanted = [plain.run(backend=backend) for plain, backend in jobs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            found = pool.map(lambda job: job[0].run(backend=job[1]), jobs)
            for mine, theirs in zip(found, wanted, strict=True):
                assert_same(mine, theirs)


FORKED = """
import os, sys, warnings
sys.path.insert(0, sys.argv[1])
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(2)
from op_cases import OPS
from adversarial_cases import case
cases = [case(op, sizes=(40, 50, 7, 5, 2)) for op in OPS]
wanted = [one.run(backend="cpu", gradient=False) for one in cases]
child = os.fork()
if child == 0:
    # As the loaders of torch do: a second thread would wait for ever for the ones that the fork left behind.
    torch.set_num_threads(1)
    same = all(
        torch.equal(mine, theirs)
        for one, results in zip(cases, wanted)
        for mine, theirs in zip(one.run(backend="cpu", gradient=False), results)
    )
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_computes_the_same():
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


FORKED_AMONG_THREADS = """
import os, sys, threading, time, warnings
sys.path.insert(0, sys.argv[1])
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(2)
from op_cases import OPS
from adversarial_cases import case
# Results of more than half a megabyte are taken from a store that all threads share.
cases = [case(op, sizes=(40, 50, 7, 5, 2)) for op in OPS] + [case("sinkhorn", sizes=(300, 400, 7, 5, 2))]
wanted = [one.run(backend="cpu", gradient=False) for one in cases]

def same(one, results):
    return all(map(torch.equal, one.run(backend="cpu", gradient=False), results))

wrong, stop = [], threading.Event()
def call(place):
    torch.set_num_threads(2)
    while not stop.is_set():
        for one, results in zip(cases[place:] + cases[:place], wanted[place:] + wanted[:place]):
            if not same(one, results):
                wrong.append(one.op)

threads = [threading.Thread(target=call, args=(place,)) for place in range(3)]
for thread in threads:
    thread.start()
for number in range(12):
    time.sleep(0.02)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if all(map(same, cases, wanted)) else 1)
    assert os.waitpid(child, 0)[1] == 0, number
stop.set()
for thread in threads:
    thread.join()
assert not wrong, wrong
"""


def test_children_forked_while_other_threads_call():
    done = subprocess.run(
        [sys.executable, "-c", FORKED_AMONG_THREADS, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
