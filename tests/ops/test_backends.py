"""The backend table: order of choice, explicit choices that never fall back, and explanations."""

import threading

import pytest
import torch

import objslot
from objslot.errors import BackendError
from objslot.ops import _backends
from objslot.ops._backends import explain_facts, register, registered, select, use_backend

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
CUDA = {"device": torch.device("cuda"), "dtype": torch.float32}


def on(kind, **limits):
    def why_not(device, dtype, n=0):
        if device.type != kind:
            return f"needs a {kind} tensor, got {device.type}"
        return f"needs n <= {limits['n']}, got {n}" if n > limits.get("n", n) else None

    return why_not


@pytest.fixture(autouse=True)
def op(monkeypatch):
    monkeypatch.setattr(_backends, "_rows", {})
    monkeypatch.delenv("OBJSLOT_BACKEND", raising=False)
    register("op", "reference", lambda **facts: None)
    register("op", "cpu", on("cpu", n=8))
    register("op", "triton", on("cuda"))
    register("op", "cuda", on("cuda"), automatic=False)


def test_automatic_takes_the_fastest_that_serves():
    assert select("op", **CPU) == "cpu"
    assert select("op", n=9, **CPU) == "reference"
    assert registered() == {"op": ("cuda", "triton", "cpu", "reference")}


def test_an_unproven_backend_is_chosen_by_name_only():
    assert select("op", **CUDA) == "triton"
    assert select("op", "cuda", **CUDA) == "cuda"


def test_argument_beats_context_beats_variable(monkeypatch):
    monkeypatch.setenv("OBJSLOT_BACKEND", "reference")
    assert select("op", **CPU) == "reference"
    with use_backend("cuda"):
        assert select("op", **CUDA) == "cuda"
        with use_backend("auto"):
            assert select("op", **CPU) == "cpu"
        assert select("op", "cpu", **CPU) == "cpu"
    assert select("op", **CPU) == "reference"
    monkeypatch.setenv("OBJSLOT_BACKEND", "")
    assert select("op", **CPU) == "cpu"


def test_an_explicit_choice_never_falls_back(monkeypatch):
    message = "op: backend 'triton' cannot serve this call: needs a cuda tensor, got cpu"
    with pytest.raises(BackendError, match=message):
        select("op", "triton", **CPU)
    with use_backend("triton"), pytest.raises(BackendError, match=message):
        select("op", **CPU)
    monkeypatch.setenv("OBJSLOT_BACKEND", "triton")
    with pytest.raises(BackendError, match=message):
        select("op", **CPU)


def test_unknown_names_list_the_known_ones(monkeypatch):
    message = "unknown backend 'gpu': expected one of reference, cpu, triton, cuda, or auto"
    with pytest.raises(BackendError, match=message):
        select("op", "gpu", **CPU)
    with pytest.raises(BackendError, match=message), use_backend("gpu"):
        pass
    monkeypatch.setenv("OBJSLOT_BACKEND", "gpu")
    with pytest.raises(BackendError, match=message):
        select("op", **CPU)
    with pytest.raises(ValueError, match="backend: expected one of"):
        register("op", "gpu", on("cuda"))


def test_an_op_without_rows_for_a_backend_says_so():
    register("bare", "reference", lambda **facts: None)
    with pytest.raises(BackendError, match="bare has no cpu kernels"):
        select("bare", "cpu", **CPU)


def test_no_backend_at_all():
    register("gpu_only", "triton", on("cuda"))
    with pytest.raises(BackendError, match=r"no backend serves this call.*needs a cuda tensor"):
        select("gpu_only", **CPU)
    assert explain_facts("gpu_only", **CPU).chosen is None


def test_the_context_is_restored_after_an_error_and_is_local_to_its_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(select("op", **CPU)))

    def fail():
        with use_backend("reference"):
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == ["cpu"]
    assert select("op", **CPU) == "cpu"


def test_explanations_agree_with_the_choice(monkeypatch):
    assert str(explain_facts("op", n=9, **CPU)) == (
        "op: reference (automatic)\n"
        "  reference serves this call\n"
        "  cpu       needs n <= 8, got 9\n"
        "  triton    needs a cuda tensor, got cpu\n"
        "  cuda      needs a cuda tensor, got cpu"
    )
    assert explain_facts("op", **CUDA).reasons["cuda"].startswith("could serve it when asked for by name, or once")
    explanation = explain_facts("op", "triton", **CPU)
    assert (explanation.chosen, explanation.origin) == (None, "backend=")
    monkeypatch.setenv("OBJSLOT_BACKEND", "reference")
    assert explain_facts("op", **CPU).origin == "OBJSLOT_BACKEND"
    with use_backend("cpu"):
        assert explain_facts("op", **CPU).origin == "use_backend"


def test_explain_wants_an_op():
    with pytest.raises(ValueError, match="op: expected the name of an op, got 'sinkhron'"):
        objslot.explain("sinkhron")
