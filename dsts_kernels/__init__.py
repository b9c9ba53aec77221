"""Fused kernels for the DSTS module of *Dynamic Spatio-Temporal Specialization Learning* (ECCV 2022).

>>> from dsts_kernels import FusedDSTS
>>> dsts = FusedDSTS(in_channels=16)
"""

from . import backends, functional, reference
from .backbones import freeze_dsts, insert_dsts, remove_dsts
from .frozen import FrozenDSTS
from .gates import SemHashGate
from .modules import DSTSLayer, FusedDSTS
from .routing import Draws, Routing

__version__ = "0.2.0.dev0"  # there alone: a build reads it here

__all__ = [
    "DSTSLayer",
    "Draws",
    "FrozenDSTS",
    "FusedDSTS",
    "Routing",
    "SemHashGate",
    "backends",
    "freeze_dsts",
    "functional",
    "insert_dsts",
    "reference",
    "remove_dsts",
]
