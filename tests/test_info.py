"""`objslot info`: what it reports is true, and its check fails for a backend that is wrong."""

import json

import pytest
import torch

from objslot import info
from objslot.checks import CASES
from objslot.errors import UserError
from objslot.ops import _backends, _native


@pytest.fixture(scope="module")
def information():
    return info.collect(check=True)


def test_every_op_and_backend_is_reported(information):
    assert set(information["ops"]) == set(CASES)
    for by_device in information["ops"].values():
        assert by_device["cpu"]["chosen"] in ("reference", "cpu")
        assert set(by_device["cpu"]["reasons"]) == set(_backends.BACKENDS)
    assert information["packages"]["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__
    json.dumps(information, allow_nan=False)


def test_every_backend_that_serves_is_checked_and_right(information):
    served = {
        (op, backend)
        for op, by_device in information["ops"].items()
        for backend, reason in by_device["cpu"]["reasons"].items()
        if reason.startswith(("serves", "could"))
    }
    checked = {
        (result["op"], result["backend"]) for result in information["checks"] if result["device"] == "cpu"
    }
    assert checked == served
    assert all(result["passed"] for result in information["checks"])


def test_the_text_says_what_the_values_say(information):
    text = info.as_text(information)
    for op, by_device in information["ops"].items():
        assert f"{op} on cpu: {by_device['cpu']['chosen']}" in text
    assert text.count("  ok   ") == len(information["checks"])


def test_a_missing_module_and_an_encoder_library_that_does_not_load_are_named(monkeypatch):
    def fail(name):
        raise UserError("the encoders need timm, which does not load")

    monkeypatch.setattr(info, "import_module", fail)
    assert info.training_missing() == "the encoders need timm, which does not load"
    monkeypatch.setattr(info.util, "find_spec", lambda name: None if name == "av" else object())
    assert info.training_missing() == "not installed: av"
    monkeypatch.setattr(_native, "why_missing", lambda: "No module named 'objslot._native'")
    assert info._native_module()["missing"] == "No module named 'objslot._native'"
