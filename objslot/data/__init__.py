"""Videos, clips and segmentations as data; nothing here knows of models or training."""

from objslot.data.find import find_videos
from objslot.data.frame_folder import FrameFolder
from objslot.data.statistics import MEAN, STD
from objslot.data.video import Video
from objslot.data.video_file import VideoFile

__all__ = ["MEAN", "STD", "FrameFolder", "Video", "VideoFile", "find_videos"]
