"""A user's code over the public face: mypy reads it (.ci/run, tests/test_types.py), nothing runs it."""

from typing import assert_type

import torch
from torch import Tensor, nn

from dsts_kernels import (
    Draws,
    DSTSLayer,
    FrozenDSTS,
    FusedDSTS,
    Routing,
    SemHashGate,
    backends,
    freeze_dsts,
    functional,
    insert_dsts,
    reference,
    remove_dsts,
)

features = torch.randn(2, 16, 4, 8, 8)
dsts = FusedDSTS(in_channels=16, num_layers=3, num_neurons=10, mixing_kernel=(1, 3, 3), norm=None, dtype=torch.float64)
literal = reference.DSTS(16, num_layers=3)
layer = DSTSLayer(16, 32)
gate = SemHashGate(16)

frozen = dsts.eval().freeze(dtype=torch.bfloat16)
assert_type(frozen, FrozenDSTS)
frozen.save("frozen.pt")
assert_type(FrozenDSTS.load("frozen.pt", map_location="cpu"), FrozenDSTS)

parameters: list[nn.Parameter] = [*dsts.upstream_parameters(), *dsts.downstream_parameters()]

model = nn.Sequential(nn.Conv3d(3, 16, 3))
assert_type(insert_dsts(model, "0", score_reduction="mean"), FusedDSTS)
freeze_dsts(model)
remove_dsts(model)

assert_type(functional.saturating_sigmoid(features), Tensor)
assert_type(backends.available(), tuple[str, ...])
assert_type(backends.explain("gated_conv3d", "cpu", torch.float32), str)
with backends.use_backend("eager"):
    y = dsts(features)
assert_type(y, Tensor)
assert_type(layer(features, return_routing=True), tuple[Tensor, Routing])
assert_type(frozen(features), Tensor)


def neurons(routing: Routing, draws: Draws) -> tuple[Tensor, Tensor]:
    return routing.neuron, draws.gumbel
