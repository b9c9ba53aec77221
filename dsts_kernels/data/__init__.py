"""Datasets: two synthetic fine-grained tasks, Diving48 and FineGym."""

from .annotations import Annotations, Clip, read_diving48, read_finegym
from .cells import SyntheticCells
from .clips import VideoClips
from .sampling import ClipSampling, Window
from .symmetries import Symmetries
from .synthetic import SyntheticDives
from .transforms import EvalTransform, TrainTransform
from .video import Extent, VideoError, decode, extent, frame_indices, probe

__all__ = [
    "Annotations",
    "Clip",
    "ClipSampling",
    "EvalTransform",
    "Extent",
    "Symmetries",
    "SyntheticCells",
    "SyntheticDives",
    "TrainTransform",
    "VideoClips",
    "VideoError",
    "Window",
    "decode",
    "extent",
    "frame_indices",
    "probe",
    "read_diving48",
    "read_finegym",
]
