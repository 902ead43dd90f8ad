"""Weights and models from strangers: no code of theirs runs, and what is wrong with them is one line."""

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from objslot.errors import UserError
from objslot.models import SMTC, SMTCConfig
from objslot.models.weights import read_state_dict


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def header(size: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", size) + text


def json_header(tensors: dict, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return header(len(text), text) + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "empty": b"",
    "header of exabytes": header(2**62),
    "header longer than the file": header(1000),
    "header of 2^64 - 1": header(2**64 - 1),
    "header that is no JSON": header(9, b"{nonsense"),
    "header nested deep": header(20000, b'{"a":' * 4000),
    "a tensor of exabytes": json_header({"a": tensor([2**40, 2**20], 0, 2**62)}),
    "sizes that overflow": json_header({"a": tensor([2**33, 2**33], 0, 0)}),
    "offsets behind the end": json_header({"a": tensor([4], 0, 16)}, b"1234"),
    "offsets that overlap": json_header({"a": tensor([1], 0, 4), "b": tensor([1], 2, 6)}, bytes(6)),
    "negative sizes": json_header({"a": tensor([-4], 0, 16)}, bytes(16)),
    "an unknown dtype": json_header({"a": tensor([4], 0, 16, "F33")}, bytes(16)),
    "a list": header(2, b"[]"),
}


def refused(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000, text
    return text


@pytest.fixture
def saved(tmp_path):
    """A saved model of two kilobytes of slots and its parts."""
    folder = tmp_path / "model"
    config = SMTCConfig(encoder="test_vit.r160_in1k", pretrained=False, image_size=32, slots=3, instances=2)
    SMTC(config).save(folder)
    return folder


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors_that_lie(tmp_path, saved, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    assert str(path) in refused(lambda: read_state_dict(path))
    (saved / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(lambda: SMTC.load(saved))


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_pickles_do_not_run(tmp_path, saved, protocol):
    for wrapped in (Bomb(tmp_path / "hit"), {"state_dict": Bomb(tmp_path / "hit")}):
        path = tmp_path / "weights.pth"
        path.write_bytes(pickle.dumps(wrapped, protocol))
        refused(lambda path=path: read_state_dict(path))
        (saved / "model.safetensors").write_bytes(path.read_bytes())
        refused(lambda: SMTC.load(saved))
        torch.save(wrapped, path)
        refused(lambda path=path: read_state_dict(path))
    assert not (tmp_path / "hit").exists()


def test_archives_do_not_leave_their_folder(tmp_path):
    path = tmp_path / "inner" / "weights.pth"
    path.parent.mkdir()
    torch.save({"a": torch.zeros(3)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escaped", b"x")
        archive.writestr("/tmp/escaped", b"x")
    before = set(tmp_path.rglob("*"))
    try:
        assert read_state_dict(path).keys() == {"a"}
    except UserError as error:
        assert "\n" not in str(error)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": 10**12},
        {"width": 10**9},
        {"image_size": 10**9},
        {"image_size": [10**6, 10**6]},
        {"slots": 10**400},
        {"slots": 4},
        {"encoder": "../../../etc/passwd"},
        {"encoder": "hf-hub:somebody/something"},
        {"encoder": "local-dir:/etc"},
        {"eps": float("inf")},
        {"surprise": 1},
    ],
    ids=str,
)
def test_configurations_that_lie(saved, changes):
    """The sizes that a configuration claims are believed only as far as the weights bear them out."""
    values = json.loads((saved / "config.json").read_text())
    values["model"] |= changes
    (saved / "config.json").write_text(json.dumps(values))
    refused(lambda: SMTC.load(saved))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"model": []}', "{" * 100_000, '{"a":' * 100_000, "\x00", '{"model": null}']
)
def test_configurations_that_are_none(saved, text):
    (saved / "config.json").write_text(text)
    refused(lambda: SMTC.load(saved))


def test_weights_that_a_configuration_names_are_not_read(saved, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "hit")))
    values = json.loads((saved / "config.json").read_text())
    values["model"]["weights"] = str(path)
    (saved / "config.json").write_text(json.dumps(values))
    SMTC.load(saved)
    assert not (tmp_path / "hit").exists()


def test_tensors_of_other_shapes_and_types(saved):
    state = load_file(saved / "model.safetensors")
    for wrong in (state | {"extra": torch.zeros(1)}, {**state, "student.slots.mu": torch.zeros(2, 2)}, {}):
        save_file(wrong, saved / "model.safetensors")
        assert "does not fit" in refused(lambda: SMTC.load(saved))
