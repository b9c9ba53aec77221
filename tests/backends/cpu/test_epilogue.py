"""The epilogue: every dtype pair and layout, operands left out, tap sums of what is stored."""

from __future__ import annotations

import itertools

import pytest
import torch

from dsts_kernels.backends.passes import Epilogue

from .support import (
    _C,
    LAYOUTS,
    acc,
    check,
    check_threads,
    empty,
    filled,
    layout_pairs,
    pairs,
    panel_of,
    shapes_of,
    tap_sums_ref,
)

pytestmark = pytest.mark.usefixtures("isa", "one_thread")


@pairs
@pytest.mark.parametrize(("skip_layout", "out_layout"), layout_pairs([*LAYOUTS, None]))
def test_values(pair, skip_layout, out_layout):
    """Every dtype pair, layout of out and skip, and operand left out; tap sums are of what is stored."""
    dtype, panel_dtype = pair
    for (nb, O, *rest), taps in itertools.product(shapes_of(pair), (1, 9)):
        shape, full = (nb, O, *rest), (nb + 2, O, *rest)
        spatial, temporal = (torch.randn(shape, dtype=torch.float64).to(panel_dtype) for _ in range(2))
        temporal = temporal if taps == 9 else None
        bias = torch.randn(O, dtype=acc(dtype))
        skip = None if skip_layout is None else filled(full, dtype, skip_layout)
        samples = torch.randperm(nb + 2)[:nb]

        def run(threads):
            out = empty(full, dtype, out_layout)
            sums = torch.full((nb + 2, O, taps), torch.nan, dtype=acc(dtype))
            epilogue = Epilogue(out, samples, bias, taps == 9, skip, sums)
            _C.epilogue(panel_of(spatial), panel_of(temporal), epilogue, threads)
            return out, sums

        out, sums = check_threads(run)
        ref = spatial.double() + (0 if temporal is None else temporal.double())
        ref = ref + bias.double()[:, None, None, None]
        ref = ref.relu() if taps == 9 else ref
        ref = ref + (0 if skip is None else skip[samples].double())
        check(out[samples], ref, dtype)
        check(sums[samples], tap_sums_ref(out[samples], taps), acc(dtype), 2)
        others = [b for b in range(nb + 2) if b not in samples]
        assert out[others].isnan().all() and sums[others].isnan().all()


def test_in_place():
    """out may be the spatial panel itself."""
    spatial, temporal = torch.randn(2, 3, 5, 5, 70), torch.randn(2, 3, 5, 5, 70)
    ref = (spatial.double() + temporal).relu()
    _C.epilogue(spatial, temporal, Epilogue(spatial.permute(0, 4, 1, 2, 3), relu=True), 1)
    check(spatial, ref, torch.float32)


def test_without_panels():
    """Both panels null: the bias alone is written everywhere."""
    bias, out = torch.randn(7), empty((2, 7, 2, 3, 3), torch.float32)
    _C.epilogue(None, None, Epilogue(out, bias=bias), 1)
    assert torch.equal(out, bias.view(1, 7, 1, 1, 1).expand_as(out))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_isolates(layout):
    """NaN passes the ReLU and stays in its sample and channel, in the output and in the sums."""
    z = torch.randn(3, 9, 2, 4, 4)
    z[1, 2, 0, 3, 3] = torch.nan
    out, sums = empty(z.shape, z.dtype, layout), torch.full((3, 9, 9), torch.nan)
    _C.epilogue(panel_of(z), None, Epilogue(out, relu=True, sums=sums), 1)
    assert out.isnan().nonzero().tolist() == [[1, 2, 0, 3, 3]]
    assert sums.isnan().any(-1).nonzero().tolist() == [[1, 2]]


def test_a_block_of_outputs():
    """A block of channels goes where it belongs, its tap sums too, and the rest is left alone."""
    z, out, sums = torch.randn(2, 5, 2, 3, 3), empty((2, 9, 2, 3, 3), torch.float32), torch.full((2, 9, 9), torch.nan)
    block = slice(3, 8)
    _C.epilogue(panel_of(z), None, Epilogue(out, sums=sums).of_outputs(block), 1)
    assert torch.equal(out[:, block], z)
    check(sums[:, block], tap_sums_ref(z, 9), torch.float32, 2)
    for written in (out, sums):
        assert written.isnan().flatten(2).any(-1).tolist() == [[c < 3 or c >= 8 for c in range(9)]] * 2
