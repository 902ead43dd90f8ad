import base64
import json
import re

import numpy as np
import pytest

from objslot.viz.report import MAX_FRAMES, VideoReport, run_lengths


def page_data(path):
    text = path.read_text()
    return text, json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    )


def decoded(code):
    n = len(code) // 3
    return np.repeat(np.frombuffer(code[:n], np.uint8), np.frombuffer(code[n:], "<u2"))


@pytest.mark.parametrize(
    "index",
    [
        np.zeros((1, 1), np.uint8),
        np.full((300, 500), 7, np.uint8),
        np.zeros((256, 1024), np.uint8),
        np.random.default_rng(0).integers(0, 3, (37, 53), dtype=np.uint8),
        np.arange(256, dtype=np.uint8)[None],
    ],
)
def test_run_lengths_decode_to_the_index_map(index):
    assert np.array_equal(decoded(run_lengths(index)).reshape(index.shape), index)


def report(n_frames, size=(30, 40), name="clip"):
    made = VideoReport(name, n_frames, size, 25)
    for t in range(n_frames):
        made.add(t, np.full((*size, 3), t % 256, np.uint8), {"objects": np.full(size, t % 3, np.uint8)})
    return made


def test_the_page_holds_every_frame_and_mask(tmp_path):
    report(4).write(tmp_path / "a.html", [{"id": 2, "score": None, "foreground": True}])
    _, page = page_data(tmp_path / "a.html")
    assert page["frames"] == [0, 1, 2, 3] and len(page["pictures"]) == 4
    layer = page["layers"]["objects"]
    masks = [decoded(base64.b64decode(code)) for code in layer["data"]]
    assert [int(mask[0]) for mask in masks] == [0, 1, 2, 0]
    assert page["objects"] == [{"id": 2, "score": None, "foreground": True, "area": [0, 0, 1, 0]}]


def test_a_long_large_video_makes_a_bounded_page(tmp_path):
    report(3 * MAX_FRAMES, size=(60, 1500)).write(tmp_path / "a.html")
    _, page = page_data(tmp_path / "a.html")
    assert len(page["frames"]) == MAX_FRAMES
    assert page["frames"][0] == 0 and page["frames"][-1] == 3 * MAX_FRAMES - 1
    assert page["facts"] == [f"This page shows {MAX_FRAMES} of the {3 * MAX_FRAMES} frames, evenly spread."]
    assert (page["height"], page["width"]) == (29, 720)
    assert (page["layers"]["objects"]["height"], page["layers"]["objects"]["width"]) == (29, 720)


def test_the_page_asks_for_nothing_from_a_network_and_survives_hostile_names(tmp_path):
    name = "</script><img src=x onerror=alert(1)>"
    report(2, name=name).write(tmp_path / "a.html")
    text, page = page_data(tmp_path / "a.html")
    assert page["name"] == name
    assert name not in text
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:", text)
    assert "default-src 'none'" in text
