"""Videos, clips and segmentations as data; nothing here knows of models or training."""

from objslot.data.find import find_videos
from objslot.data.video import FrameFolder, Video, VideoFile

# ImageNet statistics of RGB in [0, 1], which every encoder in use was trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

__all__ = ["MEAN", "STD", "FrameFolder", "Video", "VideoFile", "find_videos"]
