"""The data gradient's epilogue: every dtype pair and layout; listed, all and no channels in a panel."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dsts_kernels.backends.passes import GradientPanel

from .support import (
    _C,
    LAYOUTS,
    check,
    check_threads,
    empty,
    filled,
    layout_pairs,
    pairs,
    panel_of,
    shapes_of,
    some_channels,
)

pytestmark = pytest.mark.usefixtures("isa", "one_thread")


def merge(a: Tensor, d: Tensor, gate: Tensor, x: Tensor, dx: Tensor | None, dgate: Tensor | None) -> None:
    """Two data gradients ``(B, C, T, H, W)`` of all channels, on one thread."""
    panels = (GradientPanel(panel_of(t), None) for t in (a, d))
    _C.gate_merge(*panels, None, gate, x, dx, dgate, 1)


@pairs
@pytest.mark.parametrize(("x_layout", "dx_layout"), layout_pairs(LAYOUTS))
def test_values(pair, x_layout, dx_layout):
    """Every dtype pair and layout; listed, all and no channels in a panel; dx and dgate each optional."""
    dtype, panel_dtype = pair
    for (nb, C, *rest), lists in itertools.product(shapes_of(pair), ("listed", "all", "one side")):
        shape, full = (nb, C, *rest), (nb + 1, C, *rest)
        chosen = {
            "listed": (some_channels(C, C // 2), some_channels(C, C - C // 3)),
            "all": (None, None),
            "one side": (some_channels(C, 0), None),
        }[lists]
        panels = [
            torch.randn(nb, *rest, C if c is None else len(c), dtype=torch.float64).to(panel_dtype) for c in chosen
        ]
        gate = torch.rand(full[:2], dtype=torch.float64).mul(1.6).sub(0.3).clamp(0, 1).to(dtype)
        x, samples = filled(full, dtype, x_layout), torch.randperm(nb + 1)[:nb]

        def run(threads, want_dx=True, want_dgate=True):
            dx = empty(full, dtype, dx_layout) if want_dx else None
            dgate = torch.full(full[:2], torch.nan, dtype=dtype) if want_dgate else None
            both = (GradientPanel(*pair) for pair in zip(panels, chosen, strict=True))
            _C.gate_merge(*both, samples, gate, x, dx, dgate, threads)
            return dx, dgate

        dx, dgate = check_threads(run)
        spread = []
        for c, p in zip(chosen, panels, strict=True):
            full_panel = torch.zeros(shape, dtype=torch.float64)
            full_panel[:, slice(None) if c is None else c.long()] = p.double().permute(0, 4, 1, 2, 3)
            spread.append(full_panel)
        g = gate.double()[samples][..., None, None, None]
        check(dx[samples], g * spread[0] + (1 - g) * spread[1], dtype, 2)
        ref = (x.double()[samples] * (spread[0] - spread[1])).sum((2, 3, 4))
        check(dgate[samples], ref, dtype, 4)
        others = [b for b in range(nb + 1) if b not in samples]
        assert dx[others].isnan().all() and dgate[others].isnan().all()
        assert torch.equal(run(1, want_dgate=False)[0][samples], dx[samples])
        assert torch.equal(run(1, want_dx=False)[1][samples], dgate[samples])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_closed_side(layout):
    """A gate of exactly 1 or 0 selects: the closed side's NaN stays out of dx; dgate keeps samples apart."""
    shape = (2, 9, 2, 3, 3)
    a, d = torch.randn(shape), torch.randn(shape)
    a[0], d[1] = torch.nan, torch.inf
    gate = torch.tensor([[0.0], [1.0]]).expand(2, 9).contiguous()
    dx, x = empty(shape, torch.float32, layout), filled(shape, torch.float32, layout)
    merge(a, d, gate, x, dx, None)
    assert torch.equal(dx[0], d[0]) and torch.equal(dx[1], a[1])
    a[0], d[1] = 1.0, 2.0
    a[0, 3, 1, 1, 1] = torch.nan
    dgate = torch.full((2, 9), torch.nan)
    merge(a, d, gate, x, None, dgate)
    assert dgate.isnan().nonzero().tolist() == [[0, 3]]
