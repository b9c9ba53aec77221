"""Gated convolution against dense masked convolutions, forward and backward, over every shape of gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels.backends import convolution, groups
from dsts_kernels.functional import gated_conv3d
from dsts_kernels.ops.gated_conv import backward_op, forward_op
from dsts_kernels.testing import TOLERANCES, assert_close

pytestmark = pytest.mark.usefixtures("poison")


def hard_gate(b: int, c: int) -> torch.Tensor:
    return (torch.rand(b, c) < 0.5).double()


def mixed_gate(b: int, c: int) -> torch.Tensor:
    """Half the samples hard, the others soft with saturated channels."""
    soft = (torch.rand(b, c, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    return torch.where(torch.arange(b)[:, None] % 2 == 0, hard_gate(b, c), soft)


GATES = {
    "mixed": mixed_gate,
    "hard": hard_gate,
    "all-spatial": lambda b, c: torch.ones(b, c, dtype=torch.float64),
    "all-temporal": lambda b, c: torch.zeros(b, c, dtype=torch.float64),
    "all-half": lambda b, c: torch.full((b, c), 0.5, dtype=torch.float64),
}
NEURONS = {
    "any": lambda b, n: torch.randint(n, (b,)),
    "one": lambda b, n: torch.full((b,), n - 1),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "strided": lambda x: x.repeat(1, 2, 1, 1, 2)[:, ::2, :, :, ::2],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
SIZES = [
    pytest.param((4, 12, 3, 5, 4), 9, id="ragged"),
    pytest.param((2, 48, 8, 7, 7), 32, id="swin-plane"),
    pytest.param((3, 17, 1, 1, 1), 5, id="one-position"),
    pytest.param((2, 8, 4, 1, 6), 8, id="one-row"),
    pytest.param((5, 1, 2, 3, 1), 1, id="one-channel"),
    pytest.param((0, 6, 2, 3, 3), 4, id="empty-batch"),
]


def sample_inputs(size=(4, 12, 3, 5, 4), outputs=9, gate="mixed", neurons="any", dtype=torch.float64):
    b, c = size[:2]
    return (
        torch.randn(size, dtype=torch.float64).to(dtype),
        GATES[gate](b, c).to(dtype),
        NEURONS[neurons](b, 3),
        (torch.randn(3, outputs, c, 1, 3, 3, dtype=torch.float64) / c**0.5).to(dtype),
        (torch.randn(3, outputs, c, 3, 1, 1, dtype=torch.float64) / c**0.5).to(dtype),
    )


def literal(x, gate, neuron, spatial, temporal):
    """One sample at a time, all channels under a mask."""
    rows = []
    for b, n in enumerate(neuron.tolist()):
        g = gate[b, :, None, None, None]
        s = F.conv3d((g * x[b])[None], spatial[n], padding=(0, 1, 1))
        rows.append(s + F.conv3d(((1 - g) * x[b])[None], temporal[n], padding=(1, 0, 0)))
    return torch.cat(rows) if rows else x.new_empty(0, spatial.shape[1], *x.shape[2:])


def check(inputs, backend: str, dtype: torch.dtype) -> None:
    """Output and all four gradients against the literal ones in float64."""
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    for tensors in (inputs, wide):
        for index in (0, 1, 3, 4):
            tensors[index].requires_grad_()
    out, ref = gated_conv3d(*inputs, backend=backend), literal(*wide)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last_3d) or out.numel() == 0
    assert_close(out, ref, name="output")
    grad = torch.randn(ref.shape, dtype=torch.float64).to(dtype)
    names = ("x", "gate", "spatial", "temporal")
    mine = torch.autograd.grad(out, [inputs[i] for i in (0, 1, 3, 4)], grad)
    if not out.numel():
        assert all(g.count_nonzero() == 0 for g in mine)
        return
    theirs = torch.autograd.grad(ref, [wide[i] for i in (0, 1, 3, 4)], grad.double())
    for name, g, h in zip(names, mine, theirs, strict=True):
        assert_close(g, h, dtype=dtype, name=f"gradient of {name}", factor=2)


@pytest.mark.parametrize("neurons", NEURONS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size, outputs", SIZES)
def test_values_and_gradients(backend, size, outputs, gate, neurons):
    """All gates and groupings, ragged channels, planes of one row, an empty batch."""
    check(list(sample_inputs(size, outputs, gate, neurons)), backend, torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(backend, dtype):
    """Every dtype within its tolerance of float64."""
    check(list(sample_inputs((3, 40, 4, 6, 5), 24, dtype=dtype)), backend, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    """Any stride order of the features, in and out of the backward pass."""
    inputs = list(sample_inputs())
    inputs[0] = LAYOUTS[layout](inputs[0]).detach()
    check(inputs, backend, torch.float64)


def test_strided_weights_and_gradient(backend):
    """Weights that are slices of larger ones, and a gradient that is an expanded scalar."""
    x, gate, neuron, spatial, temporal = sample_inputs()
    spatial = torch.randn(3, 9, 24, 1, 3, 3, dtype=torch.float64)[:, :, ::2].requires_grad_()
    out = gated_conv3d(x, gate, neuron, spatial, temporal, backend=backend)
    ref = literal(x, gate, neuron, spatial, temporal)
    assert_close(out, ref)
    mine, theirs = (torch.autograd.grad(t.sum(), spatial)[0] for t in (out, ref))
    assert_close(mine, theirs)


def test_gradcheck(backend):
    """Finite differences on soft gates, which are smooth."""
    x, _, neuron, spatial, temporal = sample_inputs((2, 3, 2, 3, 2), 2)
    gate = torch.rand(2, 3, dtype=torch.float64) * 0.8 + 0.1
    tensors = [t.requires_grad_() for t in (x, gate, spatial, temporal)]
    assert torch.autograd.gradcheck(
        lambda x, g, s, t: gated_conv3d(x, g, neuron, s, t, backend=backend), tensors, fast_mode=True
    )


def test_unrouted_neurons_get_zero(backend):
    """Stacked weights: a neuron nobody chose has a gradient, and it is exactly zero."""
    x, gate, _, spatial, temporal = sample_inputs()
    spatial.requires_grad_()
    temporal.requires_grad_()
    gated_conv3d(x, gate, torch.tensor([2, 0, 2, 2]), spatial, temporal, backend=backend).sum().backward()
    assert spatial.grad[1].count_nonzero() == 0 and temporal.grad[1].count_nonzero() == 0
    assert spatial.grad[2].count_nonzero() > 0


@pytest.mark.parametrize("neurons", NEURONS)
def test_samples_stay_apart(backend, neurons):
    """NaN and Inf in one sample, or in its gradient, never reach another sample's result."""
    inputs = list(sample_inputs(neurons=neurons, dtype=torch.float32))
    inputs[0][1, 2] = float("nan")
    inputs[0][1, 3] = float("inf")
    inputs[0].requires_grad_()
    inputs[1].requires_grad_()
    out = gated_conv3d(*inputs, backend=backend)
    grad = torch.randn_like(out)
    grad[1] = float("nan")
    dx, dgate = torch.autograd.grad(out, inputs[:2], grad)
    for result in (out, dx, dgate):
        assert torch.isfinite(result[[0, 2, 3]]).all()


def test_repeats_bit_for_bit(backend):
    """Same input, same output and gradients, every time."""
    runs = []
    for _ in range(2):
        inputs = [t.clone() for t in self_seeded()]
        for i in (0, 1, 3, 4):
            inputs[i].requires_grad_()
        out = gated_conv3d(*inputs, backend=backend)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [inputs[i] for i in (0, 1, 3, 4)])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def self_seeded():
    torch.manual_seed(5)
    return sample_inputs((3, 64, 4, 8, 8), 48, dtype=torch.float32)


@pytest.mark.parametrize("gate", ["hard", "all-spatial", "all-temporal"])
def test_a_hard_gate_costs_only_its_taps(backend, gate, monkeypatch):
    """Counted, not timed: forward and weight gradients touch 9 taps of a spatial channel, 3 of a temporal one."""
    macs = count_macs(monkeypatch)
    x, g, neuron, spatial, temporal = sample_inputs((1, 16, 2, 4, 4), 8, gate)
    spatial.requires_grad_()
    temporal.requires_grad_()
    gated_conv3d(x, g, neuron, spatial, temporal, backend=backend).sum().backward()
    taps = 9 * int(g.sum()) + 3 * int((1 - g).sum())
    assert macs == {"forward": taps * 8 * 32, "data_gradient": 0, "weight_gradient": taps * 8 * 32}


@pytest.mark.parametrize(
    "trains, data, weights",
    [("x", "listed", 0), ("gate", "all", 0), ("x gate", "all", 0), ("operators", None, "listed")],
)
def test_a_frozen_side_costs_nothing(backend, trains, data, weights, monkeypatch):
    """Frozen gates need listed channels only, frozen operators no weight gradient, frozen input no data gradient."""
    macs = count_macs(monkeypatch)
    x, g, neuron, spatial, temporal = sample_inputs((1, 16, 2, 4, 4), 8, "hard")
    for tensor, name in ((x, "x"), (g, "gate"), (spatial, "operators"), (temporal, "operators")):
        tensor.requires_grad_(name in trains)
    gated_conv3d(x, g, neuron, spatial, temporal, backend=backend).sum().backward()
    taps = {"listed": 9 * int(g.sum()) + 3 * int((1 - g).sum()), "all": 12 * 16, None: 0, 0: 0}
    assert macs["data_gradient"] == taps[data] * 8 * 32
    assert macs["weight_gradient"] == taps[weights] * 8 * 32


def test_samples_of_a_neuron_share_a_call(backend, monkeypatch):
    """Equal gates and neuron: one convolution for the batch, not one a sample."""
    calls = []
    original = convolution.forward
    monkeypatch.setattr(convolution, "forward", lambda *a: calls.append(a[0].shape[0]) or original(*a))
    x, _, _, spatial, temporal = sample_inputs()
    gate = hard_gate(1, 12).expand(4, -1)
    gated_conv3d(x, gate, torch.zeros(4, dtype=torch.int64), spatial, temporal, backend=backend)
    assert calls == [4, 4]


def test_calls_stay_within_their_positions(backend, monkeypatch):
    """A large batch on one neuron is cut into calls, with the same result; its weight gradient is not."""
    inputs = list(sample_inputs((5, 12, 3, 5, 4), 9, "all-half", "one"))
    whole = gated_conv3d(*inputs, backend=backend)
    monkeypatch.setattr(groups, "CALL_POSITIONS", 2 * 60)
    macs = count_macs(monkeypatch)
    inputs[3].requires_grad_()
    out = gated_conv3d(*inputs, backend=backend)
    assert_close(out, whole)
    out.sum().backward()
    assert macs["forward"] == 12 * 12 * 9 * 5 * 60 and macs["weight_gradient"] == 9 * 12 * 9 * 5 * 60


def count_macs(monkeypatch) -> dict[str, int]:
    """Multiply-adds of every library convolution, by what it is for."""
    macs = dict.fromkeys(("forward", "data_gradient", "weight_gradient"), 0)

    def spy(name, original):
        def run(a, b, kernel):
            taps = kernel[0] * kernel[1] * kernel[2]
            if name == "weight_gradient":  # (b, c, T, H, W), (b, O, T, H, W)
                macs[name] += a.numel() * b.shape[1] * taps
            else:  # (b, T, H, W, c), (O, taps, c)
                macs[name] += a[..., 0].numel() * b.numel()
            return original(a, b, kernel)

        return run

    for name in macs:
        monkeypatch.setattr(convolution, name, spy(name, getattr(convolution, name)))
    return macs


def test_opcheck(backend):
    """Schema, fakes and dispatch of both ops."""
    inputs = sample_inputs(dtype=torch.float32)
    torch.library.opcheck(forward_op.overload, (*inputs, backend))
    grad = torch.randn(4, 9, 3, 5, 4)
    torch.library.opcheck(backward_op.overload, (grad, *inputs, [True, True, True, True], backend))
    torch.library.opcheck(backward_op.overload, (grad, *inputs, [True, False, False, True], backend))


def test_double_backward_is_refused(backend):
    """A second derivative is an error, not a silent zero."""
    inputs = list(sample_inputs((1, 3, 2, 3, 2), 2))
    inputs[0].requires_grad_()
    (dx,) = torch.autograd.grad(gated_conv3d(*inputs, backend=backend).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="gated_conv3d_backward has no derivative"):
        dx.sum().backward()


BAD = {
    "x-type": ("x", 3, TypeError, "x: got int 3"),
    "x-sparse": ("x", torch.zeros(1, 2, 1, 2, 2).to_sparse(), TypeError, "x: .*sparse_coo"),
    "x-integer": ("x", torch.zeros(2, 4, 1, 2, 2, dtype=torch.int32), TypeError, "x: .*int32"),
    "x-dims": ("x", torch.zeros(2, 4, 2, 2), ValueError, "x: .* wanted 5 dimensions"),
    "x-empty": ("x", torch.zeros(2, 4, 1, 0, 2), ValueError, "x: .* at least 1"),
    "gate": ("gate", torch.zeros(2, 5), ValueError, r"gate: .*wanted shape \(2, 4\)"),
    "neuron-shape": ("neuron", torch.zeros(3, dtype=torch.int64), ValueError, r"neuron: .*wanted shape \(2,\)"),
    "neuron-dtype": ("neuron", torch.zeros(2, dtype=torch.int32), TypeError, "neuron: .*wanted torch.int64"),
    "neuron-high": ("neuron", torch.tensor([0, 3]), ValueError, "neuron: got index 3, wanted 0 <= index < 3"),
    "neuron-low": ("neuron", torch.tensor([-1, 0]), ValueError, "neuron: got index -1"),
    "spatial": ("spatial", torch.zeros(3, 5, 4, 1, 3, 1), ValueError, r"spatial: .*wanted shape \(3, 5, 4, 1, 3, 3\)"),
    "temporal": ("temporal", torch.zeros(3, 6, 4, 3, 1, 1), ValueError, r"temporal: .*wanted shape \(3, 5, 4"),
    "dtype": ("temporal", torch.zeros(3, 5, 4, 3, 1, 1).double(), TypeError, "temporal: .*wanted torch.float32"),
    "device": ("gate", torch.zeros(2, 4, device="meta"), ValueError, "gate: got a tensor on meta, wanted cpu"),
}


@pytest.mark.parametrize("name, value, error, message", BAD.values(), ids=BAD)
def test_bad_input(name, value, error, message):
    """A wrong argument is named, with what came and what was wanted."""
    arguments = dict(
        x=torch.zeros(2, 4, 1, 2, 2),
        gate=torch.zeros(2, 4),
        neuron=torch.zeros(2, dtype=torch.int64),
        spatial=torch.zeros(3, 5, 4, 1, 3, 3),
        temporal=torch.zeros(3, 5, 4, 3, 1, 1),
    )
    with pytest.raises(error, match=message):
        gated_conv3d(**arguments | {name: value})
