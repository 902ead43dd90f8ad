import json

import numpy as np
import pytest
from PIL import Image

from objslot.data.sequences import ArraySequence
from objslot.errors import UserError
from objslot.evaluation import evaluate_dataset, read_predictions

TRUTH = np.zeros((3, 20, 30), np.uint8)
TRUTH[:, 2:9, 3:12] = 1
TRUTH[:, 10:18, 15:28] = 2


def save(folder, maps, mode="P", names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for i, values in enumerate(maps):
        image = Image.fromarray(values.astype(np.uint16) if mode == "I;16" else values)
        if mode == "P":
            image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
        path = folder / f"{names[i] if names else f'{i:05d}'}.png"
        image.save(path) if mode in ("P", "I;16") else image.convert(mode).save(path)


@pytest.fixture
def sequence():
    return ArraySequence("dog", TRUTH)


@pytest.mark.parametrize("folder", ["dog", "dog/masks"])
@pytest.mark.parametrize("mode", ["P", "L", "RGB", "RGBA", "I;16"])
def test_indexed_and_grey_masks(tmp_path, sequence, folder, mode):
    save(tmp_path / folder, TRUTH, mode)
    found = read_predictions(tmp_path, "dog", sequence)
    assert (found.tracks == TRUTH).all()
    assert found.foreground == (1, 2)
    assert found.name == "dog"
    assert (read_predictions(tmp_path, "dog").tracks == TRUTH).all()


def test_black_and_white_masks_are_one_track(tmp_path, sequence):
    save(tmp_path / "dog", (TRUTH > 0).astype(np.uint8) * 255, "L")
    assert (read_predictions(tmp_path, "dog", sequence).tracks == (TRUTH > 0)).all()
    save(tmp_path / "dog", TRUTH * 100, "L")
    assert (read_predictions(tmp_path, "dog", sequence).tracks == TRUTH).all()


def test_foreground_from_objects_json(tmp_path, sequence):
    save(tmp_path / "dog/masks", TRUTH)
    path = tmp_path / "dog/objects.json"
    path.write_text(json.dumps({"foreground": [2]}))
    assert read_predictions(tmp_path, "dog", sequence).foreground == (2,)
    path.write_text("{}")
    assert read_predictions(tmp_path, "dog", sequence).foreground == (1, 2)
    path.write_text("[")
    with pytest.raises(UserError, match=r"objects.json: cannot be read .*; expected an object with a list"):
        read_predictions(tmp_path, "dog", sequence)


def test_masks_are_matched_by_name_else_by_order(tmp_path, sequence):
    save(tmp_path / "dog", TRUTH[::-1], names=["00002", "00001", "00000"])
    Image.fromarray(TRUTH[0]).save(tmp_path / "dog/00009.png")
    assert (read_predictions(tmp_path, "dog", sequence).tracks == TRUTH).all()
    save(tmp_path / "cat", TRUTH, names=["frame2", "frame10", "frame9"])
    by_order = read_predictions(tmp_path, "cat", sequence).tracks
    assert (by_order == TRUTH[[0, 2, 1]]).all()


class HalfAnnotated(ArraySequence):
    annotated = (0, 2)


def test_the_annotated_frames_suffice(tmp_path):
    save(tmp_path / "dog", TRUTH[[0, 2]], names=["00000", "00002"])
    found = read_predictions(tmp_path, "dog", HalfAnnotated("dog", TRUTH)).tracks
    assert (found[[0, 2]] == TRUTH[[0, 2]]).all()
    assert not found[1].any()


def broken(folder):
    save(folder, TRUTH)
    (folder / "00001.png").write_bytes(b"no image")


def of_another_size(folder):
    save(folder, TRUTH)
    Image.fromarray(TRUTH[0, :10]).save(folder / "00002.png")


def in_colour(folder):
    save(folder, np.stack([TRUTH * 9, TRUTH, TRUTH], axis=-1), "RGB")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "dog: no masks for the sequence dog"),
        (
            lambda folder: save(folder, TRUTH[:2]),
            r"dog: no mask for frame 00002 of dog \(1 of 3 are missing\)",
        ),
        (lambda folder: save(folder, TRUTH[:2], names="ab"), "dog: 2 masks for the 3 frames of dog"),
        (of_another_size, "00002.png: 30 x 10 pixels; expected 30 x 20 as in dog"),
        (lambda folder: save(folder, TRUTH * 11), "dog: holds the object number 22; at most 20"),
        (
            lambda folder: save(folder, np.arange(1800).reshape(3, 20, 30).astype(np.uint8), "L"),
            "dog: holds 255 grey levels; expected at most 20",
        ),
        (broken, "00001.png: not a readable mask image"),
        (in_colour, "00000.png: a colour image; expected a mask of indices"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, sequence, make, message):
    make(tmp_path / "dog")
    with pytest.raises(UserError, match=message):
        read_predictions(tmp_path, "dog", sequence)


def test_evaluate_a_folder(tmp_path, sequence):
    save(tmp_path / "dog", TRUTH)
    results = evaluate_dataset(tmp_path, [sequence])
    assert [results["protocols"][protocol]["JF"] for protocol in "ABC"] == [1, 1, 1]
    with pytest.raises(
        UserError, match=r"no predictions for the sequence cat \(1 of 2 sequences are missing\)"
    ):
        evaluate_dataset(tmp_path, [sequence, ArraySequence("cat", TRUTH)])
    with pytest.raises(UserError, match="nowhere: no such folder of predictions"):
        evaluate_dataset(tmp_path / "nowhere", [sequence])


def test_the_given_and_the_last_frame_need_no_mask(tmp_path, sequence):
    save(tmp_path / "dog", TRUTH[1:2], names=["00001"])
    with pytest.raises(UserError, match="no mask for frame 00000 of dog .2 of 3 are missing"):
        read_predictions(tmp_path, "dog", sequence)
    sequence.first_frame_given = True
    found = read_predictions(tmp_path, "dog", sequence)
    assert (found.tracks[1] == TRUTH[1]).all() and not found.tracks[[0, 2]].any()
    result = evaluate_dataset(tmp_path, [sequence], ["semi-supervised"])
    assert result["protocols"]["semi-supervised"]["J"] == 1
