"""Times sinkhorn on the CPU beside the loops a user would write, in one interleaved run.

    python benchmarks/sinkhorn_quick.py [--threads 2] [--runs 15] [--shapes 48x256x256x3,...] [--no-compile]

Peers: the log-domain loop in eager mode and compiled, and exp(scores / eps) with alternating normalisation,
compiled. Prints milliseconds (medians) and how many times faster objslot was in the median of the ratios of the
same round, after checking every result against float64.
"""

import argparse
import statistics
import time

import torch

from objslot.ops.sinkhorn import reference, sinkhorn

SHAPES = "48x256x256x3,48x256x256x20,8x196x196x3,1x1620x1620x3"
EPS = 0.05


def log_loop(scores, n_iters):
    """The log domain with uniform marginals."""
    n, m = scores.shape[-2:]
    logits = scores / EPS
    log_a, log_b = -torch.tensor(float(n)).log(), -torch.tensor(float(m)).log()
    g = torch.zeros_like(logits[..., 0, :])
    for _ in range(n_iters):
        f = log_a - torch.logsumexp(logits + g.unsqueeze(-2), -1)
        g = log_b - torch.logsumexp(logits + f.unsqueeze(-1), -2)
    return (logits + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()


def exp_loop(scores, n_iters):
    """Alternating normalisation of exp(scores / eps)."""
    n, m = scores.shape[-2:]
    plan = torch.exp(scores / EPS)
    for _ in range(n_iters):
        plan = plan / plan.sum(-1, keepdim=True) / n
        plan = plan / plan.sum(-2, keepdim=True) / m
    return plan


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
    medians = {name: statistics.median(values) for name, values in times.items()}
    words = [f"{name} {1e3 * medians[name]:.2f} ms" for name in functions]
    for name in functions:
        if name != "objslot":
            ratio = statistics.median(x / y for x, y in zip(times[name], times["objslot"], strict=True))
            words.append(f"{name}/objslot {ratio:.1f}")
    print(f"{title}: " + ", ".join(words), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    for text in arguments.shapes.split(","):
        batch, n, m, n_iters = map(int, text.split("x"))
        torch._dynamo.reset()
        tokens = [torch.nn.functional.normalize(torch.randn(batch, size, 64), dim=-1) for size in (n, m)]
        scores = tokens[0] @ tokens[1].mT
        gradient = torch.randn_like(scores)
        functions = {"objslot": lambda s, k=n_iters: sinkhorn(s, eps=EPS, n_iters=k)}
        functions["eager log"] = lambda s, k=n_iters: log_loop(s, k)
        if not arguments.no_compile:
            functions["compiled log"] = torch.compile(lambda s, k=n_iters: log_loop(s, k))
            functions["compiled exp"] = torch.compile(lambda s, k=n_iters: exp_loop(s, k))

        def both(function, scores=scores, gradient=gradient):
            leaf = scores.detach().requires_grad_()
            return torch.autograd.grad(function(leaf), leaf, gradient)[0]

        exact = reference.sinkhorn(scores[:1].double(), eps=EPS, n_iters=n_iters)[0]
        for name, function in functions.items():
            error = ((function(scores)[:1] - exact).abs().max() / exact.max()).item()
            assert error < 1e-4, (name, error)
            both(function)
        target = torch.empty_like(scores)
        calls = {name: lambda f=f, s=scores: f(s) for name, f in functions.items()}
        calls["copy"] = lambda s=scores, t=target: t.copy_(s)
        report(f"{text} forward", calls, arguments.runs)
        report(
            f"{text} forward+backward",
            {name: lambda f=f: both(f) for name, f in functions.items()},
            arguments.runs,
        )


if __name__ == "__main__":
    main()
