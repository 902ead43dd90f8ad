"""What this installation can do: versions, devices, the compiled modules, the backends of every op.

`collect(check=True)` also runs every backend that serves a small call on this machine, forward and backward,
and compares it with the reference in float64.
"""

import platform
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, metadata, util
from pathlib import Path

import torch
from torch import Tensor

import objslot
from objslot import ops
from objslot.errors import UserError
from objslot.ops import _native
from objslot.ops._backends import BACKENDS, explain

PACKAGES = ("torch", "triton", "timm", "numpy", "scipy", "av", "safetensors", "tyro", "rich", "Pillow")
# A backend may be this many times as far from float64 as plain PyTorch in the same dtype is, plus a rounding.
ERROR_RATIO = 2.0

OPS: dict[str, Callable[[torch.Generator], tuple[tuple[Tensor, ...], dict]]] = {
    "sinkhorn": lambda g: ((_normal(g, 2, 33, 47),), {"eps": 0.1}),
    "sinkhorn_potentials": lambda g: ((_normal(g, 2, 33, 47),), {"eps": 0.1}),
    "sinkhorn_transport": lambda g: (
        (_normal(g, 2, 33, 24), _normal(g, 2, 47, 24), _normal(g, 2, 47, 5)),
        {"eps": 0.1},
    ),
    "slot_softmax": lambda g: ((_normal(g, 2, 3, 4, 65), _uniform(g, 2, 3, 65)), {}),
    "slot_attention": lambda g: (
        (_normal(g, 2, 3, 4, 24), _normal(g, 2, 65, 24), _normal(g, 2, 65, 17), _uniform(g, 2, 3, 65)),
        {},
    ),
    "assign": lambda g: ((_normal(g, 9, 4, 4),), {}),
    "propagate": lambda g: (
        (_normal(g, 1, 6, 7, 16), _normal(g, 1, 3, 6, 7, 16), _uniform(g, 1, 3, 6, 7, 4)),
        {"radius": 3, "topk": 5, "temperature": 0.2},
    ),
}


def collect(check: bool = False) -> dict:
    """Everything `objslot info` prints, as plain values ready for JSON; with `check` the checks as well."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    information = {
        "objslot": objslot.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"model": cpu_model(), "threads": torch.get_num_threads()},
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "native": _native_module(),
        "training": training_missing() or "ready",
        "ops": {name: {device.type: _explanation(name, device) for device in devices} for name in OPS},
    }
    if check:
        information["checks"] = [result for device in devices for result in checks(device)]
    return information


def training_missing() -> str | None:
    """None where the training package can be imported, else one line that says what is missing."""
    missing = [
        name for name in ("av", "safetensors", "scipy", "tyro", "rich", "PIL") if util.find_spec(name) is None
    ]
    if missing:
        return f"not installed: {', '.join(missing)}"
    try:
        import_module("objslot.models")
    except UserError as error:
        return str(error)
    return None


def checks(device: torch.device) -> Iterator[dict]:
    """One result an op and backend on `device`: {"op", "backend", "device", "error", "allowed", "passed"}.

    "error" is the largest relative error of outputs and gradients in float32 against the reference in
    float64, "allowed" is ERROR_RATIO times that of the reference in float32. A backend that raises has
    "failure" instead of both.
    """
    for name in OPS:
        function = getattr(ops, name)
        arguments, options = OPS[name](torch.Generator().manual_seed(0))
        exact = _run(function, arguments, options, torch.device("cpu"), torch.float64, "reference")
        allowed = None
        for backend in BACKENDS:
            result = {"op": name, "backend": backend, "device": device.type}
            try:
                if (
                    explain(
                        function, *_cast(arguments, device, torch.float32), **options, backend=backend
                    ).chosen
                    is None
                ):
                    continue
                found = _run(function, arguments, options, device, torch.float32, backend)
                error = max(_relative_error(one, other) for one, other in zip(found, exact, strict=True))
            except Exception as failure:
                yield {**result, "failure": f"{type(failure).__name__}: {failure}", "passed": False}
                continue
            if allowed is None:
                allowed = ERROR_RATIO * error + torch.finfo(torch.float32).eps
            yield {**result, "error": error, "allowed": allowed, "passed": error <= allowed}


def as_text(information: dict) -> str:
    """`collect`'s result for people."""
    packages = ", ".join(
        f"{name} {version or 'missing'}" for name, version in information["packages"].items()
    )
    native, cpu = information["native"], information["cpu"]
    lines = [
        f"objslot {information['objslot']}, Python {information['python']}",
        f"packages  {packages}",
        f"cpu       {cpu['model']}, {cpu['threads']} threads",
        *(f"gpu       {device['name']}, {device['memory_gib']} GiB" for device in information["devices"]),
        f"native    {native['missing'] or native['path'] + ', ' + native['isa']}",
        f"training  {information['training']}",
    ]
    for name, by_device in information["ops"].items():
        for device, explanation in by_device.items():
            lines.append(f"\n{name} on {device}: {explanation['chosen']}")
            lines += [f"  {backend:<9} {reason}" for backend, reason in explanation["reasons"].items()]
    if "checks" in information:
        lines.append("\nagainst the reference in float64")
        for result in information["checks"]:
            verdict = "ok  " if result["passed"] else "FAIL"
            found = result.get("failure") or f"error {result['error']:.1e}, allowed {result['allowed']:.1e}"
            lines.append(
                f"  {verdict} {result['op']:<20} {result['backend']:<9} {result['device']:<5} {found}"
            )
    return "\n".join(lines)


def _normal(generator, *sizes):
    return torch.randn(sizes, generator=generator, dtype=torch.float64)


def _uniform(generator, *sizes):
    return torch.rand(sizes, generator=generator, dtype=torch.float64)


def _cast(arguments, device, dtype):
    return [argument.to(torch.float32).to(device, dtype) for argument in arguments]


def _run(function, arguments, options, device, dtype, backend) -> list[Tensor]:
    """The outputs and, where there are any, the gradients of a fixed weighted sum of the outputs."""
    arguments = [argument.requires_grad_() for argument in _cast(arguments, device, dtype)]
    outputs = function(*arguments, **options, backend=backend)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    with_gradient = [output for output in outputs if output.requires_grad]
    weights = [_uniform(generator, *output.shape).to(device, dtype) for output in with_gradient]
    gradients = (
        torch.autograd.grad(with_gradient, arguments, weights, allow_unused=True) if with_gradient else ()
    )
    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


def _relative_error(found: Tensor, exact: Tensor) -> float:
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((found.detach().cpu().double() - exact.detach().double()).abs().max() / scale).item()
    return error if error == error else float("inf")


def _explanation(name: str, device: torch.device) -> dict:
    arguments, options = OPS[name](torch.Generator().manual_seed(0))
    explanation = explain(getattr(ops, name), *_cast(arguments, device, torch.float32), **options)
    return {"chosen": explanation.chosen, "origin": explanation.origin, "reasons": explanation.reasons}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    model = platform.processor() or platform.machine()
    description = Path("/proc/cpuinfo")
    if sys.platform == "linux" and description.exists():
        names = (
            line.partition(":")[2].strip()
            for line in description.read_text().splitlines()
            if "model name" in line
        )
        model = next(names, model)
    return model


def _device(index: int) -> dict:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "runtime": torch.version.hip or torch.version.cuda,
    }


def _native_module() -> dict:
    missing = _native.why_missing()
    if missing is not None:
        return {"missing": missing, "path": None, "isa": None, "cuda": None}
    module = _native.load()
    return {
        "missing": None,
        "path": module.__file__,
        "isa": module.isa(),
        "cuda": "built" if util.find_spec("objslot._cuda") else "not built",
    }
