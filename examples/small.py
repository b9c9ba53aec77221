"""What the short examples share: their options, a task of seconds, and a model with DSTS that learns it."""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from dsts_kernels import FusedDSTS

DIRECTIONS, FRAMES, SIZE = 4, 4, 16
CLASSES = 2 * DIRECTIONS
SMALL = {"num_layers": 1, "num_neurons": 2, "score_reduction": "mean"}  # learns in seconds; the paper has 3 of 10


def parser(description: str, steps: int) -> argparse.ArgumentParser:
    """``--steps``, ``--rate``, ``--seed`` and ``--device``; an example adds its own."""
    found = argparse.ArgumentParser(
        description=description.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    found.add_argument("--steps", type=at_least_1, default=steps)
    found.add_argument("--rate", type=rate, default=1e-2, help="AdamW's")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--device", type=device, default="cpu")
    return found


def at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted an integer of at least 1")
    return int(text)


def rate(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number above 0")
    return found


def device(text: str) -> torch.device:
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted cpu or cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted cpu or cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted cpu: torch sees no GPU here")
    return found


def stripes(count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Clips ``(count, 3, 4, 16, 16)`` of stripes in noise; labels ``(count,)``.

    The class is one of four directions, which any frame shows, times still or drifting, which only time shows.
    """
    label = torch.randint(CLASSES, (count,), device=device)
    angle = (label // 2 * math.pi / DIRECTIONS).view(count, 1, 1, 1)
    t, y, x = torch.meshgrid([torch.arange(size, device=device) for size in (FRAMES, SIZE, SIZE)], indexing="ij")
    phase = torch.rand(count, 1, 1, 1, device=device) * 2 * math.pi
    phase = phase + (label % 2).view(count, 1, 1, 1) * t * math.pi / 2
    clips = torch.sin(1.2 * (x * angle.cos() + y * angle.sin()) + phase)
    clips = clips + 0.3 * torch.randn_like(clips)
    return clips[:, None].expand(-1, 3, -1, -1, -1), label


def small_model() -> nn.Sequential:
    """``(B, 3, T, H, W)`` clips to ``(B, 8)`` logits; DSTS is ``model.dsts``, on ``(B, 16, T, H / 2, W / 2)``."""
    model = nn.Sequential()
    model.stem = nn.Sequential(nn.Conv3d(3, 16, (1, 5, 5), (1, 2, 2), (0, 2, 2)), nn.BatchNorm3d(16), nn.ReLU())
    model.dsts = FusedDSTS(16, **SMALL)
    model.head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, CLASSES))
    return model


def report(losses: list[float]) -> list[float]:
    """Prints how the loss fell: the means over the first and the last tenth of the steps."""
    tenth = max(len(losses) // 10, 1)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    print(f"loss: {first:.3f} at first, {last:.3f} after {len(losses)} steps")
    return losses
