"""Times the ops and modules on slots beside what a user would write, each case in one interleaved run.

    python benchmarks/slots_quick.py [--threads 2] [--runs 15] [--cases core,masked,...] [--no-compile] [--memory]

Prints milliseconds (medians) and how many times faster objslot was in the median of the ratios of the same round,
after comparing every result with objslot's. With --memory prints, instead of times, the most memory in tensors that a
forward pass, and a forward and backward pass, hold on top of their arguments; the workspaces of kernels and of BLAS
are not tensors and not counted.
"""

import argparse
import statistics
import time
from functools import partial

import peers_slots as peers
import torch
import torch._inductor.config

from objslot import nn as modules
from objslot.ops.assign import assign
from objslot.ops.slot_attention import slot_attention


def core_case(batch, slots, positions, width, groups=1, masked=False):
    q = torch.randn(batch, groups, slots // groups, width)
    k, v = torch.randn(batch, positions, width), torch.randn(batch, positions, width)
    mask = torch.rand(batch, groups, positions) if masked else None
    arguments = [q, k, v] + ([mask] if masked else [])
    return {"objslot": slot_attention, "eager": peers.core}, arguments, []


def module_case(batch, slots, positions, width):
    from slot_attention import SlotAttention

    theirs = SlotAttention(slots, width)
    mine = modules.SlotAttention(slots, width, bias=True)
    mine.load_state_dict(modules.convert_state_dict(theirs.state_dict()))
    x = torch.randn(batch, positions, width)

    def seeded(module, x):
        torch.manual_seed(0)
        found = module(x)
        return found if isinstance(found, torch.Tensor) else found.slots

    return {"objslot": partial(seeded, mine), "package": partial(seeded, theirs)}, [x], [mine, theirs]


def semantic_case(batch, semantics, instances, positions, width):
    mine = modules.SemanticSlotAttention(semantics, width, instances=instances)
    theirs = peers.TwoStages(semantics, width)
    theirs.load_state_dict(mine.state_dict())
    noise = torch.randn(semantics, instances, width)

    def ours(x):
        found = mine(x, noise=noise)
        return found.semantic_slots, found.instance_slots, found.semantic_logits, found.instance_logits

    x = torch.randn(batch, positions, width)
    return {"objslot": ours, "authors": lambda x: theirs(x, noise)}, [x], [mine, theirs]


def assign_case(count, rows, columns):
    return {"objslot": assign, "scipy loop": peers.scipy_loop}, [torch.rand(count, rows, columns)], []


CASES = {
    "core 32x16x256x384": partial(core_case, 32, 16, 256, 384),
    "core 2x16x1620x384": partial(core_case, 2, 16, 1620, 384),
    "masked 8x16*4x256x384": partial(core_case, 8, 64, 256, 384, 16, True),
    "module 32x16x256x384": partial(module_case, 32, 16, 256, 384),
    "module 8x7x4096x64": partial(module_case, 8, 7, 4096, 64),
    "semantic 16x16*4x256x384": partial(semantic_case, 16, 16, 4, 256, 384),
    "assign 512x4x4": partial(assign_case, 512, 4, 4),
}


def tensors(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def forward_backward(function, arguments, parameters, gradients):
    leaves = [x.detach().requires_grad_() for x in arguments]
    outputs = tensors(function(*leaves))
    torch.autograd.grad(outputs, [*leaves, *parameters], gradients, allow_unused=True)


def measure(functions, runs):
    """Seconds of every function in every round, the rounds interleaved."""
    times = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def report(title, functions, runs):
    times = measure(functions, runs)
    words = [f"{name} {1e3 * statistics.median(values):.3f} ms" for name, values in times.items()]
    for name in functions:
        if name != "objslot":
            ratio = statistics.median(x / y for x, y in zip(times[name], times["objslot"], strict=True))
            words.append(f"{name}/objslot {ratio:.2f}")
    print(f"{title}: " + ", ".join(words), flush=True)


def peak(run):
    """Bytes of CPU memory that `run` holds at most on top of what it starts from."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def main():
    # Compiled modules draw the random numbers that eager ones draw.
    torch._inductor.config.fallback_random = True
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--cases", default="", help="only those whose name holds one of these words")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    for name, case in CASES.items():
        if options.cases and not any(word in name for word in options.cases.split(",")):
            continue
        torch.manual_seed(0)
        torch._dynamo.reset()
        functions, arguments, nets = case()
        expected = tensors(functions["objslot"](*arguments))
        differentiable = expected[0].is_floating_point()
        if not options.no_compile and differentiable:
            functions |= {f"compiled {peer}": torch.compile(f) for peer, f in functions.items() if peer != "objslot"}
        for peer, function in functions.items():
            for found, wanted in zip(tensors(function(*arguments)), expected, strict=True):
                error = ((found - wanted).abs().max() / wanted.abs().max()).item()
                assert error < 1e-4, (name, peer, error)
        gradients = [torch.randn_like(x) for x in expected] if differentiable else []
        peers_of = [peer for peer in functions if peer != "objslot"]
        parameters = dict(zip(["objslot", *peers_of], nets[:1] + nets[1:] * len(peers_of), strict=False))
        both = {
            peer: partial(
                forward_backward, f, arguments, list(parameters[peer].parameters()) if nets else [], gradients
            )
            for peer, f in functions.items()
        }
        calls = {peer: partial(f, *arguments) for peer, f in functions.items()}

        def without_grad(call):
            with torch.no_grad():
                call()

        if options.memory:
            for kind, table in (("forward", calls), ("forward+backward", both)):
                if differentiable or kind == "forward":
                    text = ", ".join(f"{peer} {peak(call) / 2**20:.1f} MB" for peer, call in table.items())
                    print(f"{name} {kind}: {text}", flush=True)
            continue
        report(f"{name} forward", {peer: partial(without_grad, call) for peer, call in calls.items()}, options.runs)
        if differentiable:
            for call in both.values():
                call()
            report(f"{name} forward+backward", both, options.runs)


if __name__ == "__main__":
    main()
