"""Clip in, answer out: a trained checkpoint and a video to its classes, the neurons it activates, and what that costs.

:class:`Classifier` is the library's part, ``python -m dsts_kernels classify`` (:mod:`.command`) the same from a shell.
On top of backbones, learning and data; nothing below imports it.
"""

from .classifier import Classifier
from .config import ClassifierConfig
from .results import Classification, LeftOut, Times, WindowResult

__all__ = ["Classification", "Classifier", "ClassifierConfig", "LeftOut", "Times", "WindowResult"]
