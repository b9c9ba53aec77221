"""Frozen modules that move between a GPU and the CPU, in memory and in files."""

from __future__ import annotations

import copy

import pytest
import torch

from dsts_kernels import FrozenDSTS, FusedDSTS
from dsts_kernels.testing import assert_close

from ..support.modules import enliven
from .support import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore")]

SIZE = (5, 40, 3, 6, 5)


@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (3, 1, 1)], ids=str)
def test_moves_between_devices(mixing_kernel):
    """Frozen on one device and moved to the other, either way: packed weights run wherever they are."""
    options = dict(num_neurons=3, mixing_kernel=mixing_kernel, score_reduction="mean")
    dsts = FusedDSTS(40, **options)
    enliven(dsts)
    dsts.eval()
    x = torch.randn(SIZE)
    here = dsts.freeze()
    wanted = here(x)
    assert_close(copy.deepcopy(here).to(DEVICE)(x.to(DEVICE)).cpu(), wanted)
    there = dsts.to(DEVICE).freeze()
    assert_close(there(x.to(DEVICE)).cpu(), wanted)
    assert_close(there.cpu()(x), wanted)


@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (3, 1, 1)], ids=str)
def test_files_and_states_of_the_other_device(mixing_kernel, tmp_path):
    """A file or a state from one device is packed for the other, bit for bit, either way."""
    dsts = FusedDSTS(40, num_neurons=3, mixing_kernel=mixing_kernel, score_reduction="mean")
    enliven(dsts)
    x, here = torch.randn(SIZE), dsts.eval().freeze()
    wanted = here(x)
    here.save(tmp_path / "here.pt")
    there = FrozenDSTS.load(tmp_path / "here.pt", DEVICE)
    assert {layer.packing for layer in there.layers} == {"tiled"}
    assert_close(there(x.to(DEVICE)).cpu(), wanted)
    there.save(tmp_path / "there.pt")
    back = FrozenDSTS.load(tmp_path / "there.pt")
    assert torch.equal(back(x), wanted)
    enliven(dsts)
    other = dsts.freeze()
    back.load_state_dict(there.state_dict())
    there.load_state_dict(other.state_dict())
    assert torch.equal(back(x), wanted)
    assert_close(there(x.to(DEVICE)).cpu(), other(x))


def test_refuses_layers_on_two_devices():
    """A layer elsewhere than the first is named."""
    dsts = FusedDSTS(40, num_neurons=3).eval()
    dsts.layers[1].to(DEVICE)
    with pytest.raises(ValueError, match=r"layers.1.scoring: got a tensor on cuda:0, wanted cpu"):
        dsts.freeze()
