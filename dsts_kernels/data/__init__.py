"""Datasets: a synthetic fine-grained task, Diving48 and FineGym."""

from .annotations import Annotations, Clip, read_diving48, read_finegym
from .clips import VideoClips
from .synthetic import SyntheticDives
from .transforms import EvalTransform, TrainTransform
from .video import VideoError, decode, frame_indices, probe

__all__ = [
    "Annotations",
    "Clip",
    "EvalTransform",
    "SyntheticDives",
    "TrainTransform",
    "VideoClips",
    "VideoError",
    "decode",
    "frame_indices",
    "probe",
    "read_diving48",
    "read_finegym",
]
