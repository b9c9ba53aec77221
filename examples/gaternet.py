"""Gates of channels by a network of their own, as GaterNet: ``SemHashGate`` chooses filters for every image.

    python examples/gaternet.py

A small gater network sees the image first. Through a bottleneck it gives a logit for each filter of the backbone, and
``SemHashGate`` makes gates of 0 and 1 of them, which the backbone's filters are multiplied by. The cross-entropy
reaches the gater straight through the gates, and a penalty closes the gates that do not help.

Source: Chen et al., You Look Twice: GaterNet for Dynamic Filter Selection in CNNs, CVPR 2019. The task is ours: the
direction of a striped pattern in noise.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsts_kernels import SemHashGate
from examples.small import DIRECTIONS, parser, report, stripes

WIDTHS, BOTTLENECK = (16, 32), 8


class GatedNet(nn.Module):
    """``(B, 1, H, W)`` images to logits ``(B, 4)`` and the gates of all filters ``(B, 48)``."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in zip((1, WIDTHS[0]), WIDTHS, strict=True)
        )
        self.head = nn.Linear(WIDTHS[-1], DIRECTIONS)
        self.gater = nn.Sequential(
            *(nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(nn.Linear(8, BOTTLENECK), nn.BatchNorm1d(BOTTLENECK), nn.ReLU()),
            *(nn.Linear(BOTTLENECK, sum(WIDTHS)), SemHashGate(sum(WIDTHS))),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.gater(x)
        for conv, gate in zip(self.convs, gates.split(WIDTHS, dim=1), strict=True):
            x = conv(x) * gate[:, :, None, None]
        return self.head(x.mean((2, 3))), gates


def images(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First frames ``(count, 1, 16, 16)`` of stripes, and which way the stripes lie."""
    clips, labels = stripes(count, device)
    return clips[:, :1, 0], labels // 2


def main(arguments: list[str] | None = None) -> list[float]:
    this = parser(__doc__, steps=60)
    this.add_argument("--penalty", type=float, default=0.1, help="of open gates")
    options = this.parse_args(arguments)
    if not 0 <= options.penalty < math.inf:
        this.error(f"--penalty: got {options.penalty}, wanted a number of at least 0")
    torch.manual_seed(options.seed)
    model, losses = GatedNet().to(options.device), []
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    for _ in range(options.steps):
        x, labels = images(32, options.device)
        logits, gates = model(x)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        (loss + options.penalty * gates.mean()).backward()
        optimizer.step()
        losses.append(loss.item())
    x, labels = images(256, options.device)
    with torch.no_grad():
        logits, gates = model.eval()(x)  # hard gates, nothing is drawn
    share = gates.mean(0)  # of the images, by filter
    top1 = (logits.argmax(1) == labels).float().mean()
    chosen = int(((share > 0) & (share < 1)).sum())
    print(f"top-1 {top1:.1%}; {share.mean():.0%} of the gates are open; {chosen} of {len(share)} filters by image")
    return report(losses)


if __name__ == "__main__":
    main()
