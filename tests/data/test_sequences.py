import pickle

import numpy as np
import pytest
from PIL import Image

from objslot.data.sequences import open_sequences
from objslot.errors import UserError

H, W, T = 24, 36, 3
TRUTH = np.zeros((T, H, W), np.uint8)
TRUTH[:, 3:10, 4:12] = 1
TRUTH[:, 12:20, 20:30] = 2
WITH_VOID = TRUTH.copy()
WITH_VOID[:, 20:, :6] = 255
WHITE = (TRUTH > 0).astype(np.uint8) * 255


def frames(folder, names=None, suffix=".jpg", size=(H, W)):
    folder.mkdir(parents=True)
    for name in names or [f"{i:05d}" for i in range(T)]:
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(folder / f"{name}{suffix}")


def masks(folder, maps, names=None, suffix=".png", palette=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in zip(names or [f"{i:05d}" for i in range(len(maps))], maps, strict=True):
        image = Image.fromarray(values)
        if palette and values.ndim == 2:
            image.putpalette(list(range(256)) * 3)
        image.save(folder / f"{name}{suffix}")


def davis(root, name, maps, palette=True, annotations="Annotations"):
    frames(root / "JPEGImages/480p" / name)
    masks(root / annotations / "480p" / name, maps, palette=palette)


def write_list(root, path, *lines):
    path = root / "ImageSets" / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def annotations(sequence):
    return np.stack([sequence.annotation(i) for i in range(sequence.n_frames)])


def test_davis_2016_with_path_pairs(tmp_path):
    for name in ("bear", "dog"):
        davis(tmp_path, name, WHITE, palette=False)
    line = "/JPEGImages/480p/{0}/{1:05d}.jpg /Annotations/480p/{0}/{1:05d}.png"
    write_list(tmp_path, "480p/train.txt", *(line.format("bear", i) for i in range(T)))
    write_list(tmp_path, "480p/val.txt", *(line.format("dog", i) for i in range(T)))
    (dog,) = open_sequences("davis2016", tmp_path)
    assert (dog.name, dog.n_frames, dog.size) == ("dog", T, (H, W))
    assert dog.merge_objects
    assert not dog.first_frame_objects
    assert dog.annotated == (0, 1, 2)
    assert dog.frame_names == ("00000", "00001", "00002")
    assert dog.annotation(0).dtype == np.uint8
    assert (annotations(dog) == (TRUTH > 0)).all()
    assert dog.video.read([1]).shape == (1, H, W, 3)
    assert [s.name for s in open_sequences("davis2016", tmp_path, "train")] == ["bear"]
    assert [s.name for s in open_sequences("davis2016", tmp_path, "dog,bear")] == ["dog", "bear"]
    assert [s.name for s in open_sequences("davis2016", tmp_path, ["bear"])] == ["bear"]
    named = tmp_path / "mine.txt"
    named.write_text("bear\n\ndog\n")
    assert [s.name for s in open_sequences("davis2016", tmp_path, str(named))] == ["bear", "dog"]


def test_sequences_of_a_list_that_are_not_on_disk_are_left_out_with_a_warning(tmp_path):
    davis(tmp_path, "dog", WHITE, palette=False)
    write_list(tmp_path, "480p/dev.txt", "dog", "cat", "cow")
    with pytest.warns(UserWarning, match=r"2 of the 3 sequences of dev.txt are not on disk .*: cat, cow"):
        (dog,) = open_sequences("davis2016", tmp_path)
    assert dog.name == "dog"
    write_list(tmp_path, "480p/dev.txt", "cat")
    with pytest.raises(UserError, match="dev.txt: none of its 1 sequences is under"):
        open_sequences("davis2016", tmp_path)
    with pytest.raises(UserError, match="davis2016 has no sequence or list 'cow' .*; lists: dev"):
        open_sequences("davis2016", tmp_path, "cow")


def test_without_lists_every_sequence_is_opened(tmp_path):
    for name in ("dog10", "dog9"):
        davis(tmp_path, name, WHITE, palette=False)
    assert [s.name for s in open_sequences("davis2016", tmp_path)] == ["dog9", "dog10"]


def test_davis_2017_prefers_the_unsupervised_annotations(tmp_path):
    davis(tmp_path, "dog", WITH_VOID)
    masks(tmp_path / "Annotations_unsupervised/480p/dog", TRUTH[:, :, ::-1])
    write_list(tmp_path, "2017/val.txt", "dog")
    (unsupervised,) = open_sequences("davis2017", tmp_path)
    (semi,) = open_sequences("davis2017-semi", tmp_path)
    assert (annotations(unsupervised) == TRUTH[:, :, ::-1]).all()
    assert (annotations(semi) == WITH_VOID).all()
    assert semi.first_frame_objects
    assert not semi.merge_objects


def test_davis_2017_masks_serve_davis_2016(tmp_path):
    davis(tmp_path, "dog", WITH_VOID)
    (dog,) = open_sequences("davis2016", tmp_path)
    assert (annotations(dog) == WITH_VOID).all()
    assert dog.merge_objects


def test_palette_frame_with_void_alone_stays_void(tmp_path):
    maps = WITH_VOID.copy()
    maps[0][maps[0] < 255] = 0
    davis(tmp_path, "dog", maps)
    assert (annotations(open_sequences("davis2017", tmp_path)[0]) == maps).all()


def test_segtrack(tmp_path):
    names = ["girl_0", "girl_1", "girl_2"]
    frames(tmp_path / "JPEGImages/girl", names, ".png")
    masks(tmp_path / "GroundTruth/girl", WHITE, names, ".bmp", palette=False)
    frames(tmp_path / "JPEGImages/bmx", names)
    for label in (1, 2):
        white = (TRUTH == label).astype(np.uint8) * 250
        masks(tmp_path / f"GroundTruth/bmx/{label}", white, ["g1", "g2", "g10"], palette=False)
    bmx, girl = open_sequences("segtrack2", tmp_path)
    assert (annotations(girl) == (TRUTH > 0)).all()
    assert (annotations(bmx) == TRUTH).all()
    assert girl.merge_objects
    assert bmx.merge_objects


def test_fbms_grey_levels_on_black(tmp_path):
    root = tmp_path / "Testset"
    frames(root / "cats", ["cats_01", "cats_02", "cats_10"])
    levels = np.array([0, 100, 255], np.uint8)[TRUTH]
    masks(root / "cats/GroundTruth", levels[[0, 2]], ["cats_01", "cats_10"], ".pgm", palette=False)
    (cats,) = open_sequences("fbms", tmp_path)
    assert cats.annotated == (0, 2)
    assert cats.annotation(1) is None
    assert (cats.annotation(2) == TRUTH[2]).all()
    assert cats.merge_objects
    assert (open_sequences("fbms", root)[0].annotation(0) == TRUTH[0]).all()


def test_fbms_colours_on_white(tmp_path):
    names = ["bear_0001", "bear_0002", "bear_0003"]
    frames(tmp_path / "bear", names)
    colours = np.array([[255, 255, 255], [0, 255, 255], [255, 0, 0]], np.uint8)[TRUTH]
    folder = tmp_path / "bear/GroundTruth"
    masks(folder, colours, [f"{name}_gt" for name in names], ".ppm")
    masks(folder, colours[:1], ["bear_0001_PROB_gt"], ".ppm")
    (bear,) = open_sequences("fbms", tmp_path)
    assert bear.annotated == (0, 1, 2)
    assert (annotations(bear) == TRUTH).all()
    masks(folder, colours[:1], ["bear_0007_gt"], ".ppm")
    with pytest.raises(UserError, match="bear_0007_gt.ppm: no frame bear_0007 in"):
        open_sequences("fbms", tmp_path)


@pytest.mark.parametrize("parallel", [False, True])
def test_folder(tmp_path, parallel):
    for name, maps in (("b", WITH_VOID), ("a", WHITE)):
        frames(tmp_path / (f"frames/{name}" if parallel else f"{name}/frames"))
        masks(tmp_path / (f"masks/{name}" if parallel else f"{name}/masks"), maps, palette=False)
    (tmp_path / "notes").mkdir()
    a, b = open_sequences("folder", tmp_path)
    assert (a.name, b.name) == ("a", "b")
    assert a.video.name == "a"
    assert (annotations(a) == (TRUTH > 0)).all()
    assert (annotations(b) == WITH_VOID).all()
    assert not a.merge_objects
    assert (annotations(pickle.loads(pickle.dumps(b))) == WITH_VOID).all()


def test_a_mask_folder_that_does_not_match_is_named(tmp_path):
    frames(tmp_path / "dog/frames")
    with pytest.raises(UserError, match="holds no sequence in the layout of folder"):
        open_sequences("folder", tmp_path)
    folder = tmp_path / "dog/masks"
    folder.mkdir()
    with pytest.raises(UserError, match="dog/masks: holds no mask image"):
        open_sequences("folder", tmp_path)
    masks(folder, TRUTH[:2])
    with pytest.raises(UserError, match="dog/masks: 2 masks for the 3 frames of .*dog/frames"):
        open_sequences("folder", tmp_path)
    masks(folder, TRUTH[:1], ["other"])
    with pytest.raises(UserError, match="dog/masks: no mask named like frame 00002.jpg; it holds 00000.png"):
        open_sequences("folder", tmp_path)
    (folder / "other.png").unlink()
    masks(folder, TRUTH[:1, :20], ["00002"])
    with pytest.raises(
        UserError, match="00002.png: the mask has 36 x 20 pixels, the frames of dog have 36 x 24"
    ):
        open_sequences("folder", tmp_path)
    (folder / "00002.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="00002.png: not a readable mask image"):
        open_sequences("folder", tmp_path)


def test_data_set_and_root_are_checked(tmp_path):
    with pytest.raises(UserError, match="dataset: got 'davis', expected one of davis2016, davis2017"):
        open_sequences("davis", tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder; expected the root of fbms"):
        open_sequences("fbms", tmp_path / "nowhere")
    with pytest.raises(UserError, match="JPEGImages/480p: no such folder"):
        open_sequences("davis2016", tmp_path)


def test_more_names_than_a_path_may_be_long(tmp_path):
    names = [f"{'x' * 20}{i:02d}" for i in range(20)]
    for name in names:
        davis(tmp_path, name, WHITE, palette=False)
    assert [s.name for s in open_sequences("davis2016", tmp_path, ",".join(names))] == names
