"""The checks of backends fail one that is wrong, and what they prove serves by itself, on that device alone."""

import json

import pytest
import torch

from objslot import checks, info
from objslot.ops import _backends, _proof
from objslot.ops._backends import explain_facts, select

CPU = torch.device("cpu")
FACTS = {"device": torch.device("cuda"), "dtype": torch.float32}


@pytest.fixture
def rows(monkeypatch):
    """One op with kernels for a GPU that serve any call, but not by themselves."""
    rows = {"triton": (lambda **facts: None, False), "reference": (lambda **facts: None, True)}
    monkeypatch.setitem(_backends._rows, "slot_softmax", rows)
    monkeypatch.setattr(checks, "CASES", {"slot_softmax": checks.CASES["slot_softmax"]})


@pytest.fixture
def proof(monkeypatch, tmp_path):
    """An empty cache folder, and a device that needs none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_proof, "_kind", lambda device: f"made up {device.index or 0}")
    _proof._proven.cache_clear()
    yield _proof.path()
    _proof._proven.cache_clear()


def by_backend(**changes):
    return {result["backend"]: result | changes for result in checks.checks(CPU)}


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_wrong_backend_fails_in_whatever_dtype_it_is_wrong(monkeypatch, rows, wrong, dtype):
    def run(self, case, arguments, backend):
        found = original(self, case, arguments, "reference")
        return [value * wrong for value in found] if (backend, arguments[0].dtype) == ("triton", dtype) else found

    original = checks._Check._run
    monkeypatch.setattr(checks._Check, "_run", run)
    found = by_backend()
    assert found["reference"]["passed"]
    assert not found["triton"]["passed"]
    text = info.as_text({**info.collect(), "checks": list(found.values()), "not_kept": []})
    assert text.count("  FAIL ") == 1


def test_a_backend_that_raises_is_reported_and_the_others_go_on(monkeypatch, rows):
    def run(self, case, arguments, backend):
        if backend == "triton":
            raise RuntimeError("no driver")
        return original(self, case, arguments, backend)

    original = checks._Check._run
    monkeypatch.setattr(checks._Check, "_run", run)
    found = by_backend()
    assert found["reference"]["passed"]
    assert found["triton"]["failure"] == "RuntimeError: no driver"
    assert not found["triton"]["passed"]
    assert "RuntimeError: no driver" in info.as_text({**info.collect(), "checks": list(found.values()), "not_kept": []})


def test_what_is_right_and_faster_serves_by_itself_from_then_on(rows, proof):
    assert select("slot_softmax", **FACTS) == "reference"
    assert "info --check" in explain_facts("slot_softmax", **FACTS).reasons["triton"]
    result = {"op": "slot_softmax", "backend": "triton", "passed": True, "times": 2.0}
    checks.keep(FACTS["device"], [result])
    assert select("slot_softmax", **FACTS) == "triton"
    assert explain_facts("slot_softmax", **FACTS).chosen == "triton"
    assert select("slot_softmax", device=torch.device("cuda", 1), dtype=torch.float32) == "reference"
    assert select("slot_softmax", device=CPU, dtype=torch.float32) == "reference"


@pytest.mark.parametrize("changes", [{"passed": False}, {"times": 0.9}, {"times": None}])
def test_what_is_wrong_or_slower_does_not_and_takes_an_older_proof_away(rows, proof, changes):
    result = {"op": "slot_softmax", "backend": "triton", "passed": True, "times": 2.0}
    checks.keep(FACTS["device"], [result])
    checks.keep(FACTS["device"], [result | changes])
    assert select("slot_softmax", **FACTS) == "reference"


def test_rows_that_functions_share_need_all_of_them(proof):
    good = {"backend": "cuda", "passed": True, "times": 2.0}
    both = [good | {"op": "sinkhorn"}, good | {"op": "sinkhorn_potentials"}]
    checks.keep(FACTS["device"], both)
    assert _proof.holds("sinkhorn", "cuda", FACTS["device"])
    checks.keep(FACTS["device"], [both[0], both[1] | {"passed": False}])
    assert not _proof.holds("sinkhorn", "cuda", FACTS["device"])


def test_a_proof_is_of_these_kernels_and_versions(monkeypatch, rows, proof):
    checks.keep(FACTS["device"], [{"op": "slot_softmax", "backend": "triton", "passed": True, "times": 2.0}])
    monkeypatch.setattr(_proof, "_kernels", lambda: "others")
    _proof._proven.cache_clear()
    assert select("slot_softmax", **FACTS) == "reference"
    checks.keep(FACTS["device"], [])
    assert len(json.loads(proof.read_text())) == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"KERNELS": 3}', '{"KERNELS": {"made up 0": "slot_softmax triton"}}'])
def test_a_damaged_proof_proves_nothing_and_can_be_replaced(rows, proof, text):
    proof.parent.mkdir(parents=True)
    proof.write_text(text.replace("KERNELS", _proof._kernels()))
    assert select("slot_softmax", **FACTS) == "reference"
    checks.keep(FACTS["device"], [{"op": "slot_softmax", "backend": "triton", "passed": True, "times": 2.0}])
    assert select("slot_softmax", **FACTS) == "triton"


def test_a_proof_that_cannot_be_kept_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(_proof, "_kind", lambda device: "made up")
    reason = info._keep(FACTS["device"], [])
    assert reason.startswith("which GPU kernels are right cannot be kept:")
    assert str(tmp_path) in reason
