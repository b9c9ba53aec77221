"""Video backbones and DSTS in them: insertion into any model, TPN in plain PyTorch, torchvision's models by name.

On top of the modules; nothing below imports it.
"""

from .checkpoint import load_mmaction2, load_state, read_state
from .insertion import freeze_dsts, insert_dsts, remove_dsts
from .layouts import LAYOUTS, FeatureLayout
from .registry import BACKBONES, Backbone, create, swin3d_b
from .tiny import TinyNet
from .tpn import TPN, TPNOutput, classification_loss, tpn_slowonly_r50

__all__ = [
    "BACKBONES",
    "LAYOUTS",
    "TPN",
    "Backbone",
    "FeatureLayout",
    "TPNOutput",
    "TinyNet",
    "classification_loss",
    "create",
    "freeze_dsts",
    "insert_dsts",
    "load_mmaction2",
    "load_state",
    "read_state",
    "remove_dsts",
    "swin3d_b",
    "tpn_slowonly_r50",
]
