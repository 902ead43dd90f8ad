"""What this installation can do: versions, devices, the compiled modules, the backends of every op."""

import platform
import sys
from importlib import import_module, metadata, util
from pathlib import Path

import torch

import objslot
from objslot import ops
from objslot.checks import CASES, checks, keep
from objslot.errors import UserError
from objslot.ops import _native, _proof
from objslot.ops._backends import explain

PACKAGES = (
    *("torch", "triton", "timm", "numpy", "scipy", "av", "safetensors", "tyro", "rich", "Pillow"),
    "opencv-python-headless",
)


def collect(check: bool = False) -> dict:
    """Everything `objslot info` prints, as plain values ready for JSON.

    With `check` every backend is also compared with the reference in float64, and timed; GPU kernels that are right and
    faster than plain PyTorch then serve by themselves on this device.
    """
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    results = {device: list(checks(device)) for device in devices} if check else {}
    unwritten = [reason for device in results if device.type == "cuda" and (reason := _keep(device, results[device]))]
    information = {
        "objslot": objslot.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"model": cpu_model(), "threads": torch.get_num_threads()},
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "native": _native_module(),
        "training": training_missing() or "ready",
        "ops": {name: {device.type: _explanation(name, device) for device in devices} for name in CASES},
    }
    if check:
        information["checks"] = [result for of_device in results.values() for result in of_device]
        information["not_kept"] = unwritten
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
        lines += [_verdict(result) for result in information["checks"]]
        lines += information["not_kept"]
    return "\n".join(lines)


def _keep(device: torch.device, results: list[dict]) -> str | None:
    """Keeps what the checks proved; None, or why that was not possible."""
    try:
        keep(device, results)
    except OSError as error:
        return f"which GPU kernels are right cannot be kept: {_proof.path()}: {error.strerror or error}"
    return None


def _verdict(result: dict) -> str:
    found = result.get("failure")
    if found is None:
        found = f"error {result['error']:.1e}, allowed {result['allowed']:.1e}"
        if result["times"] is not None:
            found += f", {result['times']:.3g}x as fast as plain PyTorch"
    verdict = "ok  " if result["passed"] else "FAIL"
    return f"  {verdict} {result['op']:<20} {result['backend']:<9} {result['device']:<5} {found}"


def _explanation(name: str, device: torch.device) -> dict:
    case = CASES[name][0]
    explanation = explain(getattr(ops, name), *case.arguments(device, torch.float32), **case.options)
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
