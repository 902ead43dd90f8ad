"""What propagation holds: the first frame and the last ones, in half precision, however long the video is."""

import json
import subprocess
import sys
import textwrap

_PEAKS = """
    import json, resource, sys
    import numpy as np
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from objslot.data import Video
    from objslot.inference.propagate import PropagationSettings, propagate_masks
    from objslot.models import build_encoder, register_encoder

    torch.set_num_threads(1)
    grid, width, context, lengths = json.loads(sys.argv[1])
    size = tuple(8 * side for side in grid)

    class Made(Video):
        name, n_frames, size, fps = "made", 0, size, 25.0
        def __init__(self, n_frames): self.n_frames = n_frames
        def frame(self, t):
            pixels = torch.full((*size, 3), 40, dtype=torch.uint8)
            pixels[size[0] // 4 : size[0] // 2, 2 * t : 2 * t + 60] = 230
            return pixels
        def frames(self, start=0): return map(self.frame, range(start, self.n_frames))
        def read(self, indices): return torch.stack([self.frame(t) for t in indices])
        def check(self): pass
        def identity(self): return self.name

    register_encoder("wide", lambda pretrained: VisionTransformer(
        img_size=32, patch_size=8, embed_dim=width, depth=1, num_heads=8, num_classes=0, dynamic_img_size=True))
    encoder = build_encoder("wide")
    first = np.zeros(size, np.uint8)
    first[size[0] // 4 : size[0] // 2, :60] = 1
    settings = PropagationSettings(stride=8, topk=5, radius=3, context=context)
    for length in lengths:
        found = propagate_masks(encoder, Made(length), first, settings)
        assert found.tracks[-1].max() == 1
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)
"""


def test_memory_is_that_of_the_remembered_frames():
    grid, width, context = (30, 54), 768, 20
    remembered = (1 + context) * grid[0] * grid[1] * width * 2 / 2**20
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_PEAKS), json.dumps([grid, width, context, [4, 24, 64]])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    few, full, long = map(float, done.stdout.split())
    # What the encoder holds meanwhile is there from the first frames on. Single precision would be 100 MiB.
    assert full - few < remembered + 20
    # 40 frames more are 95 MiB of tokens and 4 MiB of masks.
    assert long - full < 20
