"""Packed filters: there and back, with every count of channels, none included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels.backends import packing

PAD = F.pad


def pad_of_old(x: torch.Tensor, *given) -> torch.Tensor:
    """``F.pad`` as torch before 2.10 has it."""
    if x.numel() == 0:
        raise RuntimeError("The input size 0, plus negative padding 0 and 0 resulted in a negative output size")
    return PAD(x, *given)


@pytest.mark.parametrize("form", packing.PACKINGS)
@pytest.mark.parametrize("outputs", [3, 16, 24])
@pytest.mark.parametrize("channels", [0, 1, 32, 45])
@pytest.mark.parametrize("taps", [3, 9])
def test_there_and_back(monkeypatch, form, outputs, channels, taps):
    """The size is the one that was said, and what is read is what was packed; a side may have no channel."""
    monkeypatch.setattr(F, "pad", pad_of_old)
    panel = torch.randn(outputs, taps, channels)
    flat = packing.pack(panel, form)
    assert flat.shape == (packing.packed_size(form, outputs, taps, channels, panel.dtype),) and flat.is_contiguous()
    assert torch.equal(packing.unpack(flat, form, outputs, taps, channels), panel)
