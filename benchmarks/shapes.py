"""What is measured: feature shapes by name, module sizes, and how many multiplications each takes.

A :class:`Problem` is one row group of the table. Its *literal* count is what the formulas cost as they are
written (ten scoring convolutions, both operators on all channels, mixing); its *useful* count is what is left
after the exact algebra of the design (collapsed scores, each channel through one operator, mixing folded
where nothing trains). Taps that fall on the zero padding are counted, as convolution libraries do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["NAMED_SHAPES", "Problem", "parse_shape"]

NAMED_SHAPES = {
    "tpn": (8, 16, 16),  # TPN with a ResNet-50: 1024 x 8 x 16 x 16
    "swin": (16, 7, 7),  # Video Swin-B, last stage: 1024 x 16 x 7 x 7
}

SPATIAL_TAPS, TEMPORAL_TAPS = 9, 3


@dataclass(frozen=True)
class Problem:
    """A module of ``layers`` layers with ``neurons`` neurons on features ``(batch, channels, *grid)``."""

    name: str
    grid: tuple[int, int, int]
    batch: int = 1
    channels: int = 1024
    layers: int = 3
    neurons: int = 10

    @property
    def feature_shape(self) -> tuple[int, int, int, int, int]:
        return (self.batch, self.channels, *self.grid)

    @property
    def positions(self) -> int:
        """Positions of the whole batch, ``B * T * H * W``."""
        frames, height, width = self.grid
        return self.batch * frames * height * width

    @property
    def label(self) -> str:
        """Name and shape as a reader wants them: ``tpn 1x1024x8x16x16``."""
        sizes = "x".join(str(n) for n in self.feature_shape)
        return f"{self.name} {sizes}" if self.name in NAMED_SHAPES else sizes

    def literal_macs(self, mode: str) -> int:
        """Multiply-adds of the formulas as written; a training step is three times the forward pass."""
        per_position = self.neurons + SPATIAL_TAPS + TEMPORAL_TAPS + 1  # all are channels x channels matrices
        forward = self.layers * self.positions * per_position * self.channels**2
        return forward if mode == "evaluation" else 3 * forward

    def useful_macs(self, mode: str, spatial: float = 0.5, hard: float = 0.5) -> float:
        """Multiply-adds after the exact algebra, direct convolutions (no Winograd).

        spatial: the share of channels behind the spatial operator under a hard gate.
        hard: the share of hard samples in training; a soft gate sends each channel through both operators.
        Data gradients always take all taps: a gate's gradient needs both operators' on every channel.
        """
        dense = SPATIAL_TAPS + TEMPORAL_TAPS
        listed = spatial * SPATIAL_TAPS + (1 - spatial) * TEMPORAL_TAPS
        if mode == "evaluation":
            taps = listed
        else:
            operators = hard * listed + (1 - hard) * dense  # the forward pass, and again the weight gradient
            taps = 2 * operators + dense + 3  # one more matrix each for the mixing convolution
        return self.layers * self.positions * taps * self.channels**2


def parse_shape(text: str) -> tuple[str, tuple[int, int, int]]:
    """``"tpn"``, ``"swin"`` or ``"TxHxW"`` to a name and a grid; raises ``ValueError`` for anything else."""
    if text in NAMED_SHAPES:
        return text, NAMED_SHAPES[text]
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if match is None or "0" in match.groups():
        raise ValueError(f"shape: got {text!r}, wanted one of {sorted(NAMED_SHAPES)} or TxHxW such as 8x16x16")
    frames, height, width = (int(n) for n in match.groups())
    return text, (frames, height, width)
