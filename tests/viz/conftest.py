"""A checkpoint whose routing is known."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.learning.checkpoint import FORMAT

L, N = 2, 3


@pytest.fixture
def routing():
    """Layer 0 follows the class; layer 1 ignores it and follows ``half``."""
    label = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    half = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    frames = torch.arange(3 * 6 * 4 * 5, dtype=torch.uint8).view(3, 6, 4, 5)
    return {
        "neuron": torch.stack([2 * label, half]),
        "label": label,
        "class_names": ["left", "right", "never"],
        "attributes": {"half": half},
        "attribute_names": {"half": ["early", "late"]},
        "frames": frames,
        "frame_samples": torch.tensor([5, 0, 6]),
    }


@pytest.fixture
def history():
    usage = [[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], [[0.2, 0.3, 0.5], [0.75, 0.25, 0.0]]]
    return [
        {"epoch": 0, "usage": usage[0], "dead": [0, 2], "saturated": [0.1, 0.2], "entropy": [1.5, 0.0]},
        {"epoch": 1, "train_loss": 1.0},
        {"epoch": 2, "usage": usage[1], "dead": [0, 1], "saturated": [0.6, 0.9], "entropy": [1.48, 0.81]},
    ]


@pytest.fixture
def checkpoint(routing, history):
    model = {f"dsts.{key}": value for key, value in FusedDSTS(4, num_layers=L, num_neurons=N).state_dict().items()}
    return {"format": FORMAT, "options": {}, "epoch": 2, "model": model, "history": history, "routing": routing}


@pytest.fixture
def matplotlib():
    import matplotlib as module

    module.use("Agg")
    return module
