"""Layers that do not freeze together: unlike the first, of another class, twice in a module, compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsts_kernels import DSTSLayer, FusedDSTS

from .support.frozen import check_freezes, lively

pytestmark = pytest.mark.usefixtures("poison")


class OwnForward(DSTSLayer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def replaced(index: int, **options) -> FusedDSTS:
    dsts = lively()
    dsts.layers[index] = DSTSLayer(**{"in_channels": 12, "num_neurons": 3} | options)
    return dsts


def with_weight(name: str, change) -> FusedDSTS:
    dsts = lively()
    setattr(dsts.layers[1], name, nn.Parameter(change(getattr(dsts.layers[1], name).detach())))
    return dsts


def with_lazy_gate() -> FusedDSTS:
    dsts = lively()
    dsts.layers[1].gate = nn.UninitializedParameter()
    return dsts


def other(layer: nn.Module) -> FusedDSTS:
    dsts = lively()
    dsts.layers[1] = layer
    return dsts


def no_layers() -> FusedDSTS:
    dsts = lively()
    dsts.layers = nn.ModuleList()
    return dsts


UNLIKE = {
    "neurons": (
        lambda: replaced(1, num_neurons=4),
        ValueError,
        "layers.1: got 4 neurons, 12 channels out, 12 channels",
    ),
    "channels": (lambda: replaced(2, in_channels=8), ValueError, "layers.2: got 3 neurons, 8 channels out, 8 channels"),
    "outputs": (
        lambda: replaced(2, out_channels=8),
        ValueError,
        "layers.2: got 3 neurons, 8 channels out, 12 channels",
    ),
    "dtype": (
        lambda: replaced(1, dtype=torch.float64),
        TypeError,
        "layers.1.gate: got torch.float64, wanted torch.float32",
    ),
    "one-dtype": (
        lambda: with_weight("mixing", torch.Tensor.half),
        TypeError,
        "layers.1.mixing: got torch.float16, wanted torch.float32",
    ),
    "class": (
        lambda: other(nn.Conv3d(12, 12, 1)),
        TypeError,
        "layers.1: got Conv3d, wanted DSTSLayer, whose forward pass is what is folded",
    ),
    "forward": (lambda: other(OwnForward(12, num_neurons=3)), TypeError, "layers.1: got OwnForward, wanted DSTSLayer"),
    "lazy": (
        with_lazy_gate,
        ValueError,
        "layers.1.gate: got UninitializedParameter, wanted a tensor: run a forward pass first",
    ),
    "flattened": (
        lambda: with_weight("spatial", torch.flatten),
        ValueError,
        "layers.1.spatial: got .*wanted 6 dimensions",
    ),
    "cut": (
        lambda: with_weight("scoring", lambda v: v[:2]),
        ValueError,
        r"layers.1.scoring: .*wanted \(3, 12, 12, 1, 1, 1\)",
    ),
    "kernel": (
        lambda: with_weight("temporal", lambda v: v.repeat(1, 1, 1, 1, 3, 1)),
        ValueError,
        r"layers.1.temporal: got .*, wanted \(3, 12, 12, 3, 1, 1\)",
    ),
    "none": (no_layers, ValueError, "layers: got none, wanted at least 1"),
    "backend": (
        lambda: replaced(1, backend="eager"),
        ValueError,
        "backend: got layers with 'eager' and None, wanted one",
    ),
}


@pytest.mark.parametrize("make, error, message", UNLIKE.values(), ids=UNLIKE)
def test_refuses_layers_unlike_the_first(make, error, message):
    """Sizes, dtypes, classes and backends that one frozen module cannot have."""
    with pytest.raises(error, match=message):
        make().eval().freeze()


def test_refuses_an_instance_forward():
    """A forward pass that was replaced on the object is not the one that is folded."""
    dsts = lively()
    dsts.layers[1].forward = lambda x, *args, **kwargs: x
    with pytest.raises(TypeError, match=r"layers.1: got DSTSLayer, .* whose forward pass is what is folded"):
        dsts.freeze()


def test_layers_of_other_options():
    """Options that belong to a layer may differ from layer to layer; a backend asked for settles backends."""
    dsts = lively()
    dsts.layers[0] = DSTSLayer(12, num_neurons=3, scoring_kernel=(1, 3, 3), scoring_width=2, score_reduction="mean")
    dsts.layers[1] = DSTSLayer(12, num_neurons=3, mixing_kernel=(3, 1, 1), activation=None, backend="eager")
    dsts.layers[2] = DSTSLayer(12, num_neurons=3, mixing_kernel=(1, 3, 3), norm=None)
    check_freezes(dsts, backend="eager")


def test_a_layer_that_is_there_twice():
    """One layer in two places is frozen in both."""
    dsts = lively()
    dsts.layers[2] = dsts.layers[0]
    check_freezes(dsts)


def test_compiled_layers():
    """A layer that torch.compile wrapped is the layer inside."""
    dsts, x = lively(), torch.randn(4, 12, 3, 5, 4)
    wanted = dsts.freeze()(x)
    dsts.layers[0] = torch.compile(dsts.layers[0])
    dsts.layers[1].compile()
    assert torch.equal(dsts.freeze()(x), wanted)


def test_reads_and_leaves_the_source_alone():
    """Freezing changes no weight, asks for no gradient and keeps no hold of the source's memory."""
    dsts = lively(norm=None)
    before = {name: value.clone() for name, value in dsts.state_dict().items()}
    fast = dsts.freeze()
    assert all(torch.equal(value, before[name]) for name, value in dsts.state_dict().items())
    assert not any(b.requires_grad for b in fast.buffers())
    held = {p.untyped_storage().data_ptr() for p in dsts.parameters()}
    assert not held & {b.untyped_storage().data_ptr() for b in fast.buffers()}
