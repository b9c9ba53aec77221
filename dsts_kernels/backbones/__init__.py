"""Video backbones with a place for DSTS: TPN in plain PyTorch, and torchvision's models by name."""

from .checkpoint import load_mmaction2, load_state, read_state
from .registry import BACKBONES, Backbone, create, swin3d_b
from .tpn import TPN, TPNOutput, classification_loss, tpn_slowonly_r50

__all__ = [
    "BACKBONES",
    "TPN",
    "Backbone",
    "TPNOutput",
    "classification_loss",
    "create",
    "load_mmaction2",
    "load_state",
    "read_state",
    "swin3d_b",
    "tpn_slowonly_r50",
]
