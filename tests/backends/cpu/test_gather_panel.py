"""Gathered panels: every pair of layouts and dtypes, copies bit for bit, sums of nothing but what was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .support import (
    _C,
    LAYOUTS,
    check,
    check_threads,
    dtypes,
    empty,
    filled,
    layout_pairs,
    pairs,
    shapes_of,
    some_channels,
)

pytestmark = pytest.mark.usefixtures("isa", "one_thread")


def gather(
    src: Tensor,
    samples: Tensor | None,
    channels: Tensor | None,
    scale: Tensor | None,
    complement: bool,
    out: Tensor,
    threads: int = 1,
) -> Tensor:
    _C.gather_panel(src, samples, channels, scale, complement, out, threads)
    return out


def gather_ref(src, samples, channels, scale, complement, width):
    ref = src.double()
    if scale is not None:
        s = 1 - scale.double() if complement else scale.double()
        ref = ref * s.expand(src.shape[:2])[..., None, None, None]
    ref = ref[samples] if samples is not None else ref
    ref = ref[:, channels.long()] if channels is not None else ref
    zeros = ref.new_zeros(len(ref), width - ref.shape[1], *ref.shape[2:])
    return torch.cat([ref, zeros], 1)


@pairs
@pytest.mark.parametrize(("src_layout", "out_layout"), layout_pairs(LAYOUTS))
def test_values(pair, src_layout, out_layout):
    """Every pair of layouts and dtypes: copies bit for bit, scaled, complemented, padded with zeros."""
    dtype, out_dtype = pair
    for shape in shapes_of(pair):
        B, C, *rest = shape
        src = filled(shape, dtype, src_layout)
        channels = some_channels(C, (C + 1) // 2)
        samples = torch.tensor([B - 1, 0, B - 1]) if B else torch.zeros(0, dtype=torch.int64)
        scale = torch.rand(B, C, dtype=torch.float64).to(dtype)
        listed = len(channels)
        for width, chosen, by, complement in [
            (C + 3, None, None, False), (listed, channels, scale, False), (listed + 5, channels, scale, True)
        ]:  # fmt: skip
            full = (len(samples), width, *rest)

            def run(threads):
                out = empty(full, out_dtype, out_layout)
                return [gather(src, samples, chosen, by, complement, out, threads)]

            out = check_threads(run)[0]
            ref = gather_ref(src, samples, chosen, by, complement, width)
            if by is None:
                assert torch.equal(out.double(), ref)
            else:
                check(out, ref, dtype if dtype == out_dtype else torch.float32)


@dtypes
@pytest.mark.parametrize("taps", [(1, 3, 3), (3, 1, 1)], ids=["spatial", "temporal"])
def test_weights(dtype, taps):
    """Weights (O, C, taps) gathered to (O, taps, C'): output channels as the batch, taps as positions."""
    weights = filled((70, 200, *taps), dtype)
    channels = torch.arange(0, 200, 3, dtype=torch.int32)
    out = check_threads(
        lambda k: [gather(weights, None, channels, None, False, empty((70, 72, *taps), dtype, "channels_last"), k)]
    )
    assert torch.equal(out[0].double(), gather_ref(weights, None, channels, None, False, 72))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_payload(layout):
    """An unscaled bfloat16 copy keeps every bit pattern, NaN payloads included."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(1, 64, 4, 16, 16)
    out = gather(bits, None, None, None, False, empty(bits.shape, torch.bfloat16, layout))
    assert torch.equal(out.contiguous().view(torch.uint16).int(), bits.view(torch.uint16).int())


def test_half_conversions():
    """All 65536 float16 and bfloat16 values load exactly, and rounding back and scaled agrees with torch."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).view(1, 64, 4, 16, 16)
        wide = gather(x, None, None, None, False, empty(x.shape, torch.float32))
        torch.testing.assert_close(wide, x.float(), rtol=0, atol=0, equal_nan=True)
        scale = torch.linspace(0.3, 1.7, 64).to(dtype)
        out = gather(x, None, None, scale[None], False, empty(x.shape, dtype))
        ref = (x.float() * scale.float().view(1, 64, 1, 1, 1)).to(dtype)
        torch.testing.assert_close(out, ref, rtol=0, atol=0, equal_nan=True)
