"""Writing a video that plays in a browser: H.264, yuv420p, the index at the front of the file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from objslot.errors import UserError

_BT709 = 1
_LIMITED_RANGE = 1


class VideoWriter:
    """Writes RGB frames to an MP4 file, one at a time.

        with VideoWriter("overlay.mp4", fps=25) as writer:
            writer.write(frame)

    The size is that of the first frame; odd sides grow by one repeated pixel, as yuv420p needs even ones.

    Args:
        path: the file to write.
        fps: frames per second, positive.
        quality: constant rate factor of x264, 0 (lossless) to 51.

    Raises:
        ValueError: `fps` is not positive, or a later frame has another size.
        UserError: this build of PyAV has no H.264 encoder.
    """

    def __init__(self, path: str | Path, fps: float, quality: int = 22):
        import av

        if not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        if "libx264" not in av.codecs_available:
            raise UserError(
                "this build of PyAV has no libx264; install its wheel: pip install --force-reinstall av"
            )
        self._av = av
        self._rate = Fraction(fps).limit_denominator(1001)
        self._quality = quality
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self._stream = None
        self._shape: tuple[int, ...] | None = None

    def write(self, frame: np.ndarray) -> None:
        """Adds one frame, uint8 (H, W, 3) RGB."""
        frame = np.asarray(frame)
        if self._stream is None:
            self._open(frame.shape)
        if frame.shape != self._shape:
            raise ValueError(f"frame must have the shape of the first one, {self._shape}, got {frame.shape}")
        odd = frame.shape[0] % 2, frame.shape[1] % 2
        if any(odd):
            frame = np.pad(frame, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        self._container.mux(self._stream.encode(picture))

    def _open(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._stream = self._container.add_stream("libx264", rate=self._rate)
        self._stream.height, self._stream.width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": str(self._quality), "preset": "veryfast"}
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE

    def close(self) -> None:
        """Flushes the encoder and completes the file."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is None:
            self.close()
        else:
            self._container.close()
