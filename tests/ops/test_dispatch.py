"""Whatever listens sees every op: modes, tracers, exporters, transforms, lazy bits; else nothing is asked."""

from __future__ import annotations

import io

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dsts_kernels import FusedDSTS, reference
from dsts_kernels.ops import _library
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

from ..support.profiling import profile
from .stated import Dispatch, operands, stated

pytestmark = pytest.mark.usefixtures("poison")


class Recorder(TorchDispatchMode):
    """Keeps the names of our ops that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dsts_kernels":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


OPS: dict[str, Dispatch] = stated("DISPATCH")


def case(name: str) -> tuple:
    op = OPS[name]
    values = operands()
    wanted = op.operands if op.differentiable is None else op.differentiable
    return tuple(values[n] for n in op.operands), op.ours, op.literal, wanted, op.operands


def gradients(run, args, wanted, names):
    args = [a.clone().requires_grad_(n in wanted) for n, a in zip(names, args, strict=True)]
    run(*args).square().sum().backward()
    return [a.grad for a in args if a.requires_grad]


def assert_same(mine, theirs) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, b, factor=10)


@pytest.mark.parametrize("name", OPS)
def test_nothing_is_asked_where_nothing_listens(name, monkeypatch):
    """Plain eager calls, with gradients and without, in inference mode too, take the short way."""
    asked = []
    monkeypatch.setattr(_library.Op, "overload", property(lambda op: asked.append(op)), raising=False)
    args, ours, _, wanted, names = case(name)
    gradients(ours, args, wanted, names)
    with torch.no_grad():
        ours(*args)
    with torch.inference_mode():
        ours(*args)
    assert not asked


@pytest.mark.parametrize("name", OPS)
def test_modes_see_every_op(name):
    """A dispatch mode sees the op and its backward pass, with the values and gradients there are without it."""
    args, ours, literal, wanted, names = case(name)
    with Recorder() as recorder:
        mine = gradients(ours, args, wanted, names)
    assert_same(mine, gradients(literal, args, wanted, names))
    base = OPS[name].op or name
    assert base in recorder.seen
    assert (f"{base}_backward" in recorder.seen) == OPS[name].backward


@pytest.mark.parametrize("which", ["negative", "zero"])
@pytest.mark.parametrize("name", OPS)
def test_lazy_bits(name, which):
    """An operand whose memory does not hold its values: x.conj().imag, and zeros that were never written."""
    args, ours, literal, _, names = case(name)
    for i in range(len(args) if which == "negative" else 1):  # zeros come as features, and as gradients
        lazy = list(args)
        zeros = torch._efficientzerotensor(args[i].shape, dtype=torch.float64)
        lazy[i] = torch._neg_view(args[i]) if which == "negative" else zeros
        assert lazy[i].is_neg() or lazy[i]._is_zerotensor()
        dense = [a + 0 for a in lazy]
        assert_close(ours(*lazy), literal(*dense), factor=10, name=f"{names[i]}, no gradient")


@pytest.mark.parametrize("name", OPS)
def test_a_lazily_negative_gradient(name):
    """The same bit on what comes back: a loss that takes the imaginary part of a conjugate."""
    args, ours, literal, wanted, names = case(name)

    def loss(run):
        return lambda *a: torch.complex(torch.zeros_like(y := run(*a)), y).conj().imag * y.detach()

    assert_same(gradients(loss(ours), args, wanted, names), gradients(loss(literal), args, wanted, names))


@pytest.mark.parametrize("name", OPS)
def test_strided_operands(name):
    """Every operand in turn transposed, sliced and expanded: what reads memory gets it dense."""
    args, ours, literal, wanted, names = case(name)
    layouts = (
        lambda a: a.transpose(0, -1).contiguous().transpose(0, -1),
        lambda a: torch.stack([a, a.new_full(a.shape, float("nan"))], -1)[..., 0],
        lambda a: a[:, :1].expand(a.shape) if a.dim() < 5 else a[..., :1].expand(a.shape),
    )
    for i in range(len(args)):
        for layout in layouts:
            strided = list(args)
            strided[i] = layout(args[i])
            assert not strided[i].is_contiguous() or strided[i].shape[-1] == 1
            leaves = [a.detach().requires_grad_(n in wanted) for n, a in zip(names, strided, strict=True)]
            out = ours(*leaves)
            assert_close(out, literal(*strided), factor=10, name=f"{names[i]}")
            found = torch.autograd.grad(out.square().sum(), [a for a in leaves if a.requires_grad])
            assert_same(found, gradients(literal, strided, wanted, names))


@pytest.mark.parametrize("name", OPS)
def test_func_grad_and_vmap(name):
    """torch.func.grad, vmap over any operand and dimension, and both together: per-sample gradients."""
    args, ours, literal, wanted, names = case(name)
    places = tuple(i for i, n in enumerate(names) if n in wanted)
    grads = [torch.func.grad(lambda *a, run=run: run(*a).square().sum(), places)(*args) for run in (ours, literal)]
    assert_same(*grads)
    for i in places:
        many = torch.stack([args[i] * k for k in (1.0, 0.5, -2.0)], dim=1)
        dims = tuple(1 if j == i else None for j in range(len(args)))
        stacked = (*args[:i], many, *args[i + 1 :])
        loop = [literal(*args[:i], many.select(1, k), *args[i + 1 :]) for k in range(3)]
        assert_close(torch.func.vmap(ours, dims, out_dims=1)(*stacked), torch.stack(loop, 1), factor=10)
        each = [
            torch.func.vmap(torch.func.grad(lambda *a, run=run: run(*a).square().sum(), i), dims)(*stacked)
            for run in (ours, literal)
        ]
        assert_close(*each, factor=10)


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_is_refused_by_name(name):
    """A tangent is an error that names the op, never a silent zero."""
    args, ours, *_ = case(name)
    message = f"dsts_kernels::{OPS[name].op or name} has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda a: ours(a, *args[1:]), args[:1], args[:1])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        ours(forward_ad.make_dual(args[0], args[0]), *args[1:])
    with forward_ad.dual_level(), Recorder(), pytest.raises(NotImplementedError, match=message):
        ours(forward_ad.make_dual(args[0], args[0]), *args[1:])


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_second_derivatives(name, listening):
    """Refused by name where there is none, whatever the loss, unused inputs allowed or not; else the right one."""
    args, ours, literal, wanted, names = case(name)
    for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
        results = []
        for run in (ours, literal):
            leaves = [a.clone().requires_grad_(n in wanted) for n, a in zip(names, args, strict=True)]
            leaves = [a for a in leaves if a.requires_grad]
            full = iter(leaves)
            inputs = [next(full) if n in wanted else a for n, a in zip(names, args, strict=True)]

            def second(run=run, leaves=leaves, inputs=inputs):
                with Recorder() if listening and run is ours else torch.enable_grad():
                    first = torch.autograd.grad(loss(run(*inputs)), leaves, create_graph=True)
                    total = sum((g * torch.arange(1.0, g.numel() + 1).view(g.shape)).sum() for g in first)
                    if not total.requires_grad:  # a linear op under a linear loss
                        return [None] * len(leaves)
                    return torch.autograd.grad(total, leaves, allow_unused=True)

            if run is ours and not OPS[name].second:
                with pytest.raises(NotImplementedError, match="_backward has no derivative"):
                    second()
            elif OPS[name].second:
                results.append([torch.zeros_like(a) if g is None else g for g, a in zip(second(), leaves, strict=True)])
        if results:
            assert_same(*results)


OPTIONS = {
    "default": {},
    "all": dict(routing_gradient="all"),
    "kernels": dict(scoring_kernel=(1, 3, 3), mixing_kernel=(3, 1, 1)),
    "bare": dict(norm=None, activation=None, skip=False),
}


def pair(**options):
    options = dict(num_neurons=3, num_layers=2, dtype=torch.float64, score_reduction="mean") | options
    fused, literal = FusedDSTS(6, **options), reference.DSTS(6, **options)
    literal.load_state_dict(fused.state_dict())
    return (
        fused,
        literal,
        torch.randn(3, 6, 2, 4, 4, dtype=torch.float64),
        sample_draws(3, 6, 3, 2, dtype=torch.float64),
    )


def module_gradients(run, module, x, draws):
    x = x.clone().requires_grad_()
    run(x, draws).square().sum().backward()
    found = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    module.zero_grad()
    return found


def listeners(fused, x, draws):
    def traced(a, d):
        return torch.jit.trace(fused, (x, draws), check_trace=False)(a, d)

    def recorded(a, d):
        with Recorder():
            return fused(a, d)

    def profiled(a, d):
        with profile():
            return fused(a, d)

    exported = torch.export.export(fused, (x, draws)).module()
    strictly = torch.export.export(fused, (x, draws), strict=True).module()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    return {
        "export": (exported, exported),
        "export, strict": (strictly, strictly),
        "compile": (compiled, fused),
        "jit.trace": (traced, fused),
        "mode": (recorded, fused),
        "profiler": (profiled, fused),
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_gradient_of_the_module(options):
    """Exported, traced, compiled, recorded and profiled, the module in training has the literal module's gradients."""
    torch._dynamo.reset()
    fused, literal, x, draws = pair(**options)
    for module in (fused, literal):
        for layer in module.layers:
            if layer.norm is not None:
                layer.norm.momentum = 0.0
    expected = module_gradients(literal, literal, x, draws)
    for name, (run, module) in listeners(fused, x, draws).items():
        found = module_gradients(run, module, x, draws)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, name=f"{name}: gradient of {key}", factor=1000)


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_traced_exported_and_saved(frozen, tmp_path):
    """In evaluation, for other batches and sizes than the one that was traced; from a file too."""
    fused, literal, x, _ = pair()
    literal.eval()
    module = fused.eval().freeze() if frozen else fused.eval()
    traced = torch.jit.trace(module, (x,))  # which runs it again and compares
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    for run in (traced, torch.jit.load(buffer)):
        for other in (x, torch.randn(5, 6, 3, 5, 6, dtype=torch.float64)):
            with torch.no_grad():
                assert_close(run(other), literal(other), factor=10)


def test_traced_routing_of_another_size():
    """Scores are means over the positions of the clip at hand, not of the one that was traced."""

    class Scores(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x, return_routing=True)[1].scores

    fused, literal, x, _ = pair()
    other = torch.randn(2, 6, 3, 5, 6, dtype=torch.float64)
    expected = literal.eval()(other, return_routing=True)[1].scores
    fused.eval()
    for module in (fused, fused.freeze()):
        assert_close(torch.jit.trace(Scores(module), (x,))(other), expected, factor=10)


def test_script_is_refused():
    """One clear error, from within a larger model too."""
    fused, *_ = pair()
    for module in (fused, fused.layers[0], fused.eval().freeze(), torch.nn.Sequential(fused)):
        with pytest.raises(
            RuntimeError, match=r"torch.jit.script: got \w+, which chooses its kernels .* torch.jit.trace"
        ):
            torch.jit.script(module)


def test_functional_call_and_per_sample_gradients():
    """torch.func over the module: gradients of all parameters, and of every sample by vmap."""
    fused, literal, x, _ = pair(norm=None)
    params = dict(fused.eval().named_parameters())
    literal.eval()

    def loss(module):
        return lambda p, one: torch.func.functional_call(module, p, (one[None],)).square().sum()

    mine = torch.func.vmap(torch.func.grad(loss(fused)), (None, 0))(params, x)
    for i in range(len(x)):
        one = torch.func.grad(loss(literal))(params, x[i])
        for name, value in one.items():
            if not name.endswith(("scoring", "gate")):  # evaluation has hard gates; the literal one is straight-through
                assert_close(mine[name][i], value, name=name, factor=10)


def count(module, x) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops()


def test_flops_are_those_that_gates_let_through():
    """Evaluation, frozen and training, counted by hand from the routing; a user's own formula comes first."""
    fused, _, x, draws = pair(num_layers=1)
    with torch.no_grad():
        _, routing = fused.eval()(x, return_routing=True)
    spatial = int(routing.gate.sum())
    temporal = routing.gate.numel() - spatial
    positions = 2 * 4 * 4
    operators = 2 * (9 * spatial + 3 * temporal) * 6 * positions
    scores, mixing = 2 * 3 * 6 * 3, 2 * 3 * 6 * 6 * positions
    assert count(fused, x) == operators + scores + mixing
    assert count(fused.freeze(), x) == operators + scores
    asked = []
    mine = {torch.ops.dsts_kernels.frozen_layer: lambda *a, **k: asked.append(a) or 7}
    fast = fused.freeze()
    with FlopCounterMode(display=False, custom_mapping=mine) as counter:
        fast(x)
    assert asked and counter.get_total_flops() == 7

    soft = draws._replace(hard=torch.zeros_like(draws.hard), noise=torch.zeros_like(draws.noise))
    soft = type(draws)(*(field[:1] for field in soft))
    fused.train().layers[0].gate.data.zero_()  # every gate is a half, so both operators read every channel
    with FlopCounterMode(display=False) as counter:
        fused(x, soft).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    ops = torch.ops.dsts_kernels
    whole = 2 * 12 * x.shape[0] * 6 * 6 * positions
    assert counts[ops.gated_conv3d] == whole and counts[ops.gated_conv3d_backward] == 2 * whole
    assert counts[ops.mixing_conv3d] == mixing and counts[ops.mixing_conv3d_backward] == 2 * mixing


def test_flops_of_fake_tensors():
    """Without data every channel is counted in both operators, an upper bound."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fused = FusedDSTS(6, num_neurons=3, num_layers=1).eval()
        x = torch.randn(3, 6, 2, 4, 4)
        assert count(fused, x) == 2 * 12 * 3 * 6 * 6 * 32 + 2 * 3 * 6 * 3 + 2 * 3 * 6 * 6 * 32
