"""Who may import whom, read from the source of the package, and what a light import must leave alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import objslot

PACKAGE = Path(__file__).resolve().parents[1] / "objslot"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
BACKEND_FILES = {"reference", "native", "triton_kernels", "cuda"}

ALLOWED = {
    "errors": set(),
    "ops": {"errors"},
    "nn": {"ops"},
    "models": {"nn", "ops", "errors", "objectives"},
    "objectives": {"nn", "ops", "errors"},
    "data": {"errors", "viz"},
    "evaluation": {"data", "errors", "viz"},
    "viz": {"data", "errors"},
    "inference": {"models", "nn", "ops", "data", "viz", "errors"},
    "training": {"objectives", "models", "nn", "ops", "data", "errors"},
    "checks": {"benchmarks", "ops"},
    "info": {"checks", "models", "ops", "errors"},
    "demo": {"training", "models", "data", "evaluation", "inference", "viz", "errors"},
    "benchmarks": {"training", "objectives", "models", "nn", "ops", "info", "errors"},
    "ablations": {"training", "models", "data", "evaluation", "inference", "viz", "errors"},
    "commands": None,
    "cli": None,
}


def imports(path: Path, source: str | None = None):
    """Every (module, imported inside a function) that the file imports, relative imports made absolute."""
    tree = ast.parse(path.read_text() if source is None else source)
    package = ["objslot", *path.relative_to(PACKAGE).parent.parts]

    def visit(node, lazy):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *filter(None, [child.module])])
                yield from ((f"{module}.{alias.name}", lazy) for alias in child.names)
            else:
                yield from visit(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    return list(visit(tree, False))


def part(module: str) -> str:
    """The part of the package that a module, or a name re-exported by the root, belongs to."""
    name = [*module.split("."), ""][1]
    return "ops" if name in objslot.__all__ else name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here in ("__init__", "__main__"):
        return
    assert here in ALLOWED, f"{here}: say in ALLOWED whom it may import"
    if ALLOWED[here] is None:
        return
    foreign = {part(module) for module, _ in imports(path) if module.startswith("objslot.")} - {here}
    assert foreign <= ALLOWED[here]


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda path: path.stem)
def test_ops_need_torch_alone(path):
    standard = sys.stdlib_module_names | {"objslot"}
    for module, lazy in imports(path):
        root = module.split(".")[0]
        if root == "triton":
            assert lazy or path.stem.startswith("triton_"), (
                "only the lazily imported triton_kernels and what it is made of may need triton"
            )
        else:
            assert root in standard | {"torch"}, f"{path.name} imports {module}"


KERNELS = [path for path in SOURCES if path.parent.parent.name == "ops" and path.stem in BACKEND_FILES]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_backends_never_import_each_other(path):
    foreign = {name for module, _ in imports(path) for name in module.split(".")} & BACKEND_FILES
    assert not foreign - {path.stem}


def test_triton_kernels_are_imported_lazily():
    for path in SOURCES:
        for module, lazy in imports(path):
            assert lazy or ".triton_kernels" not in module, f"{path.name} imports {module} at import"


HEAVY = ("timm", "torchvision", "triton", "av", "cv2", "scipy", "rich", "tyro", "PIL")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("objslot", HEAVY),
        ("objslot.ops", HEAVY),
        ("objslot.nn", HEAVY),
        # Its memory counts, and encoders come from timm with torchvision.
        ("objslot.inference.propagate", ("triton", "av", "cv2", "scipy", "rich", "tyro")),
    ],
)
def test_light_import(module, heavy):
    if "torchvision" not in heavy:
        pytest.importorskip("torchvision", reason="needs a torchvision built for this torch", exc_type=Exception)
    code = (
        f"import {module}, sys; print(*sorted({{name.split('.')[0] for name in sys.modules}} & set({heavy})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_bare_import_leaves_torch_alone():
    code = "import objslot, sys; light = 'torch' not in sys.modules; objslot.sinkhorn, objslot.nn; print(light)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_the_rules_see_every_form_of_import():
    source = (
        "import objslot.cli\nfrom objslot import data\n"
        "def f():\n    from ..models.smtc import SMTC\n    from . import x\n"
    )
    found = imports(PACKAGE / "ops" / "_checks.py", source)
    assert found == [
        ("objslot.cli", False),
        ("objslot.data", False),
        ("objslot.models.smtc.SMTC", True),
        ("objslot.ops.x", True),
    ]
