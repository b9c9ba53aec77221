"""How a kernel cuts features into boxes of positions: the rows of its tiles.

A tile's rows are the positions of a box ``(frames, rows, columns)``, each a power of two, so a convolution's tap
shifts the box as a whole and what lies outside the features reads as zero: by the hardware where a tensor descriptor
loads the box, by a mask elsewhere. For each size the box that covers the features with the fewest tiles is taken.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ..gpu.features import cdiv


def next_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class Box(NamedTuple):
    """Positions of a tile: frames, rows, columns."""

    t: int
    h: int
    w: int

    def tiles(self, t: int, h: int, w: int) -> int:
        """Boxes that cover features of ``t`` frames of ``h`` rows and ``w`` columns."""
        return cdiv(t, self.t) * cdiv(h, self.h) * cdiv(w, self.w)


@functools.cache
def best_box(positions: int, t: int, h: int, w: int) -> Box:
    """The box of ``positions`` (a power of two) that covers ``(t, h, w)`` with the fewest tiles.

    Among equals the widest in columns, then rows, is taken: neighbours in memory stay in one tile. No side exceeds
    256, the most that a tensor descriptor loads.
    """
    sides = [1 << i for i in range(positions.bit_length())]
    found = [Box(bt, bh, positions // (bt * bh)) for bt in sides for bh in sides if positions // (bt * bh)]
    allowed = [box for box in found if max(box) <= 256] or found
    return min(allowed, key=lambda box: (box.tiles(t, h, w), -min(box.w, next_power(w)), -min(box.h, next_power(h))))
