"""What a user does around a layer works as around ``nn.Conv3d``: in-place ops, hooks, odd parameters, bad input."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from dsts_kernels import FusedDSTS, functional, reference
from dsts_kernels.ops import mixing_conv3d, tap_sums
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

pytestmark = pytest.mark.usefixtures("poison")


class Scale(nn.Module):
    """A norm of a user's own, which returns what it was given changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 8, dtype=torch.float64))

    def forward(self, z):
        return z.mul_(self.weight[:, None, None, None])


NORMS = {
    "none": lambda: None,
    "batch": lambda: nn.BatchNorm3d(8, dtype=torch.float64),
    "identity": nn.Identity,
    "in-place": Scale,
}


def pair(norm=None, **options):
    """A fused and a literal module, their norms replaced, with gates on both sides."""
    options = dict(num_neurons=3, num_layers=2, dtype=torch.float64, score_reduction="mean") | options
    fused, literal = FusedDSTS(8, **options), reference.DSTS(8, **options)
    for module in (fused, literal):
        for layer in module.layers:
            nn.init.normal_(layer.gate)
            if norm is not None:
                layer.norm = NORMS[norm]()
    literal.load_state_dict(fused.state_dict())
    return fused, literal


def inputs(channels_last: bool = False):
    x = torch.randn(4, 8, 3, 5, 4, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
    return x, sample_draws(4, 8, 3, 2, dtype=torch.float64)


def gradients(module, change, x, draws):
    x = x.clone().requires_grad_()
    y = change(module(x, draws))
    # No sum of squares alone: behind a norm that is all but constant, and its gradients are rounding.
    (y.sin() * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [x.grad, *(p.grad for p in module.parameters())]


CHANGES = {
    "relu_": lambda y: y.relu_(),
    "mul_": lambda y: y.mul_(3),
    "slice": lambda y: (y[:, ::2].zero_(), y)[1],
}


@pytest.mark.parametrize("routing_gradient", ["selected", "all"])
@pytest.mark.parametrize("norm", NORMS)
def test_in_place_after_the_module(norm, routing_gradient, backend):
    """What comes out may be changed in place in training, and every gradient is the literal module's."""
    fused, literal = pair(norm, activation=None, skip=False, routing_gradient=routing_gradient)
    for layer in fused.layers:
        layer.backend = backend
    for channels_last, change in itertools.product((False, True), CHANGES.values()):
        x, draws = inputs(channels_last)
        for module in (fused, literal):
            module.zero_grad()
        results = [gradients(module, change, x, draws) for module in (fused, literal)]
        for mine, theirs in zip(*results, strict=True):
            assert_close(mine, theirs, factor=1000)


def test_in_place_after_every_op(backend):
    """Each public op on its own."""
    x = torch.randn(2, 8, 2, 4, 4, requires_grad=True)
    weight = torch.randn(3, 8, 8, 1, 1, 1, requires_grad=True)
    spatial, temporal = torch.randn(3, 8, 8, 1, 3, 3), torch.randn(3, 8, 8, 3, 1, 1)
    neuron, gate = torch.tensor([0, 2]), torch.rand(2, 8)
    logits = torch.randn(2, 8, requires_grad=True)
    for out in (
        functional.gated_conv3d(x, gate, neuron, spatial, temporal, backend=backend),
        mixing_conv3d(x, neuron, weight, backend=backend),
        functional.semhash_gate(logits, backend=backend),
        functional.saturating_sigmoid(x, backend=backend),
        functional.relevance_scores(x, weight, backend=backend),
        tap_sums(x, 1, backend=backend),
    ):
        before = out.detach().clone()
        out.mul_(2).sum().backward()
        assert torch.equal(out.detach(), 2 * before)


@pytest.mark.parametrize("where", ["norm", "global", "subclass", "caching"])
def test_what_was_kept_is_not_overwritten(where):
    """A hook on the norm, a global one, and norms that keep what they return, with gradients on and off."""
    fused, _ = pair("batch", num_layers=1)
    fused.eval()
    norm, kept, handle = fused.layers[0].norm, [], None
    if where == "norm":
        norm.register_forward_hook(lambda module, args, out: kept.append(out))
    elif where == "global":
        keep = lambda module, args, out: kept.append(out) if module is norm else None  # noqa: E731
        handle = nn.modules.module.register_module_forward_hook(keep)
    else:

        class Keeping(nn.BatchNorm3d if where == "subclass" else nn.Module):
            def forward(self, z):
                kept.append(super().forward(z) if where == "subclass" else z - 0.5)
                return kept[-1]

        fused.layers[0].norm = Keeping(8, dtype=torch.float64).eval() if where == "subclass" else Keeping()
    try:
        x, _ = inputs()
        fused(x)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                fused(x)
    finally:
        if handle is not None:
            handle.remove()
    assert len(kept) == 3 and kept[0].min() < 0
    assert all(torch.equal(k, kept[0]) for k in kept)


def test_relu_is_in_place_where_nobody_looks(monkeypatch):
    """Without hooks and gradients the large fresh memory is saved."""
    seen, relu = [], torch.nn.functional.relu
    monkeypatch.setattr(torch.nn.functional, "relu", lambda z, inplace=False: seen.append(inplace) or relu(z, inplace))
    fused, _ = pair(num_layers=1)
    x, _ = inputs()
    fused.eval()(x)
    with torch.no_grad():
        fused(x)
    assert seen == [False, True]


class Doubled(nn.Module):
    """A parametrization that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, w):
        self.asked += 1
        return 2 * w


@pytest.mark.parametrize("name", ["scoring", "gate", "spatial", "temporal", "mixing"])
@pytest.mark.parametrize("routing_gradient", ["selected", "all"])
def test_parametrizations(name, routing_gradient):
    """Each parameter under a parametrization: asked once a pass, gradients as the literal module's."""
    fused, literal = pair(routing_gradient=routing_gradient)
    for module in (fused, literal):
        for layer in module.layers:
            parametrize.register_parametrization(layer, name, Doubled())
    x, draws = inputs()
    counters = [layer.parametrizations[name][0] for layer in fused.layers]
    before = [counter.asked for counter in counters]
    results = []
    for module in (fused, literal):
        x_ = x.clone().requires_grad_()
        module(x_, draws).square().sum().backward()
        results.append({"x": x_.grad, **{n: p.grad for n, p in module.named_parameters()}})
    assert [counter.asked for counter in counters] == [b + 1 for b in before]
    for key, value in results[1].items():
        assert_close(results[0][key], value, name=key, factor=1000)
    assert_close(fused.eval()(x), literal.eval()(x), factor=10)


LAYOUTS = {
    "transposed": lambda p: p.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda p: torch.stack([p, torch.full_like(p, float("nan"))], -1)[..., 0],
    "negative": lambda p: torch._neg_view(-p),
}


@pytest.mark.parametrize("how", ["assign", "swap", "data"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_any_layout(layout, how):
    """Parameters whose memory is not dense: loaded by assignment, swapped in, put in; live, training and frozen."""
    fused, literal = pair()
    state = {k: v.detach().clone() for k, v in fused.state_dict().items()}
    if how == "assign":
        strided = {k: LAYOUTS[layout](v) if v.dim() else v for k, v in state.items()}
        fused.load_state_dict(strided, assign=True)
    else:
        for p in fused.parameters():
            laid = LAYOUTS[layout](p.detach().clone())
            if how == "data":
                p.data = laid
            else:
                torch.utils.swap_tensors(p, nn.Parameter(laid))
    strides = [p.is_contiguous() and not p.is_neg() for p in fused.parameters()]
    assert not all(strides)
    x, draws = inputs()
    with torch.no_grad():
        expected = copy.deepcopy(literal).eval()(x)
        assert_close(copy.deepcopy(fused).eval().freeze()(x), expected, factor=10, name="frozen")
        assert_close(copy.deepcopy(fused).eval()(x), expected, factor=10, name="evaluation")
    results = [gradients(module, lambda y: y, x, draws) for module in (fused, literal)]
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs, factor=1000)


def test_draws_of_any_layout():
    """Noise, coins and Gumbel draws that are transposed, expanded and lazily negative."""
    fused, literal = pair()
    x, draws = inputs()
    noise = draws.noise.transpose(0, 2).contiguous().transpose(0, 2)
    hard = draws.hard[:1].expand(2, -1)
    gumbel = torch._neg_view(draws.gumbel[:, :, :1].expand(-1, -1, 3))
    odd = type(draws)(noise, hard, gumbel)
    results = [gradients(module, lambda y: y, x, odd) for module in (fused, literal)]
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs, factor=1000)
    plain = type(draws)(noise.contiguous(), hard.contiguous(), gumbel.resolve_neg().contiguous())
    assert_close(fused(x, odd), fused(x, tuple(plain)))


ORDERS = {
    "BTHWC": ((2, 3, 5, 4, 8), r"permute\(0, 4, 1, 2, 3\)"),
    "BTCHW": ((2, 3, 8, 5, 4), r"transpose\(1, 2\)"),
    "CTHW": ((8, 3, 5, 4), r"unsqueeze\(0\)"),
    "frames": ((6, 8, 5, 4), r"unflatten\(0, \(B, T\)\).transpose\(1, 2\)"),
    "tokens": ((2, 60, 8), ""),
}


@pytest.mark.parametrize("shape, hint", ORDERS.values(), ids=ORDERS)
def test_other_orders_of_dimensions(shape, hint):
    """Features of another order are refused with the order wanted and the way there, by live and frozen modules."""
    fused, _ = pair()
    for module in (fused, fused.layers[0], fused.eval().freeze()):
        with pytest.raises(ValueError, match=rf"x: got .*wanted .*\(B, C, T, H, W\).*{hint}"):
            module(torch.randn(shape, dtype=torch.float64))


def test_refused_calls_draw_nothing():
    """A dtype that is not the module's leaves the generator where it was."""
    fused, _ = pair()
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match=r"x: got .*float32, wanted torch.float64"):
        fused(torch.randn(2, 8, 3, 5, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
