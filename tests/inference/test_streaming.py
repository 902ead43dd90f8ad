"""Long videos: what is spooled is what was put in, and memory does not grow with the length."""

import gc
import json

import numpy as np
import pytest
import torch
from peaks import assert_growth

from objslot.inference import spool
from objslot.inference.segment import draw_regions, model_regions, segment_video
from objslot.inference.spool import MaskSpool


@pytest.mark.parametrize("in_memory", [1 << 20, 100])
def test_a_spool_gives_back_its_masks_in_any_order(in_memory, monkeypatch, tmp_path):
    monkeypatch.setattr(spool, "IN_MEMORY", in_memory)
    masks = torch.rand(7, 3, 4, 5).half()
    spooled = MaskSpool(tmp_path)
    spooled.append(masks[:2])
    assert torch.equal(spooled[1], masks[1])
    spooled.append(masks[2:].float())
    assert len(spooled) == 7 and torch.equal(spooled[6], masks[6]) and torch.equal(spooled[0], masks[0])
    assert torch.equal(torch.stack(list(spooled)), masks)
    with pytest.raises(IndexError):
        spooled[7]
    with pytest.raises(ValueError, match="expected .3, 4, 5. as before"):
        spooled.append(masks[:, :2])
    del spooled
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_frames_drawn_one_at_a_time_are_those_drawn_at_once(model, video, monkeypatch):
    whole = segment_video(model, video, seed=2)
    monkeypatch.setattr(spool, "IN_MEMORY", 1)
    drawing = draw_regions(model_regions(model, video, seed=2), video)
    assert (drawing.n_frames, drawing.foreground, drawing.scores) == (19, whole.foreground, whole.scores)
    for t in (18, 3, 3):
        labels = drawing.frame(t, video.array[t])
        assert np.array_equal(labels.tracks, whole.tracks[t])
        assert np.array_equal(labels.partition, whole.partition[t])


# Both lengths are beyond what the video encoder holds back.
_GROWTH = """
    import json, sys, tempfile
    import torch
    torch.set_num_threads(1)
    from objslot.data import Video
    from objslot.inference import spool
    from objslot.inference.display import display_maps
    from objslot.inference.segment import draw_regions, model_regions
    from objslot.inference.writer import write_segmentation
    from objslot.models import SMTC, SMTCConfig

    height, width, lengths, out = json.loads(sys.argv[1])
    out = tempfile.mkdtemp(dir=out)
    spool.IN_MEMORY = 1 << 20

    class Made(Video):
        name, n_frames, size, fps = "made", 0, (height, width), 25.0
        def __init__(self, n_frames): self.n_frames = n_frames
        def frame(self, t):
            pixels = torch.full((height, width, 3), 40, dtype=torch.uint8)
            left = 7 * t % (width // 2)
            pixels[height // 4 : height // 2, left : left + width // 4, :2] = 230
            return pixels
        def read(self, indices): return torch.stack([self.frame(t) for t in indices])
        def frames(self, start=0): return map(self.frame, range(start, self.n_frames))
        def check(self): pass
        def identity(self): return self.name

    torch.manual_seed(0)
    model = SMTC(SMTCConfig(encoder="objslot_tiny", image_size=64, slots=4, instances=4)).eval()
    for k, length in enumerate(lengths):
        video = Made(length)
        regions = model_regions(model, video, spool_in=out)
        maps = display_maps(model, video, regions, [0, length - 1])
        written = write_segmentation(video, draw_regions(regions, video), f"{out}/{k}", maps=maps)
        assert written["frames"] == length
        print(peak_of_this_process())
"""


def test_memory_does_not_grow_with_the_length(tmp_path):
    # 100 frames more are 148 MiB of pixels, or 49 MiB of one index map.
    assert_growth(_GROWTH, json.dumps([540, 960, [60, 160], str(tmp_path)]), most=(25,))


@pytest.mark.slow
def test_memory_of_minutes_is_that_of_seconds(tmp_path):
    # Both pages hold 200 frames. 5700 frames are 528 MiB of pixels, 176 MiB of one index map and 89 MiB of masks; six
    # numbers a track and frame remain, which take most as the lists that objects.json is made of.
    assert_growth(_GROWTH, json.dumps([135, 240, [300, 6_000], str(tmp_path)]), most=(60,))
