"""torch.compile and the dispatcher on the GPU: whole graphs forward and backward, schemas, fakes."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import functional
from dsts_kernels.backends import use_backend
from dsts_kernels.ops import mixing_conv3d, tap_sums
from dsts_kernels.ops.frozen_layer import frozen_layer_op
from dsts_kernels.testing import assert_close

from ..support.modules import draws_for, training_step
from .support import DEVICE, HALF, gated_inputs, pair, randn, why_not

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

SIZE = (3, 24, 3, 6, 5)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiler(default: bool) -> str:
    """Torch's default compiler, which takes a while and needs Triton, or one that only captures."""
    return "inductor" if default and why_not("triton", HALF) is None else "aot_eager"


OPS = {
    "saturating_sigmoid": lambda x, gate, neuron, w: functional.saturating_sigmoid(x),
    "semhash_gate": lambda x, gate, neuron, w: functional.semhash_gate(gate, w["noise"], w["hard"], neuron=neuron),
    "tap_sums": lambda x, gate, neuron, w: tap_sums(x, 9),
    "relevance_scores": lambda x, gate, neuron, w: functional.relevance_scores(x, w["scoring"]),
    "gated_conv3d": lambda x, gate, neuron, w: functional.gated_conv3d(x, gate, neuron, w["spatial"], w["temporal"]),
    "mixing_conv3d": lambda x, gate, neuron, w: mixing_conv3d(x, neuron, w["mixing"]),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_op_is_one_graph(gpu_backend, op):
    """Values and gradients of the compiled op are those of the op, with no graph break."""
    x, gate, neuron, spatial, temporal = gated_inputs(3, 24, 24, SIZE[2:], torch.float32)
    w = dict(spatial=spatial, temporal=temporal, mixing=randn(3, 24, 24, 1, 3, 3), scoring=randn(2, 4, 24, 1, 3, 3))
    w |= dict(noise=torch.zeros(3, 24, device=DEVICE), hard=torch.tensor([True, False, True], device=DEVICE))
    leaves = [x.requires_grad_(), gate.requires_grad_()]
    with use_backend(gpu_backend):
        plain = op(x, gate, neuron, w)
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(x, gate, neuron, w)
        assert_close(compiled, plain)
        mine, theirs = (torch.autograd.grad(y.sum(), leaves, allow_unused=True) for y in (compiled, plain))
    for g, h in zip(mine, theirs, strict=True):
        assert (g is None) == (h is None)
        if g is not None:
            assert_close(g, h)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_module_trains_compiled(gpu_backend, dtype):
    """The whole module, forward and backward, in one graph; in half precision through the default compiler."""
    ref, fused = pair(gpu_backend, SIZE[1], dtype, num_layers=2, activation=None)
    x, grad = randn(*SIZE, dtype=dtype), randn(*SIZE, dtype=dtype)
    draws = draws_for(ref, x, dtype)
    plain = training_step(fused, x, draws, grad)
    compiled = training_step(torch.compile(fused, fullgraph=True, backend=compiler(dtype == HALF)), x, draws, grad)
    assert torch.equal(compiled[1].neuron, plain[1].neuron)
    assert_close(compiled[0], plain[0])
    for (name, g), h in zip(compiled[2].items(), plain[2].values(), strict=True):
        assert_close(g, h, dtype=dtype, name=name, factor=10)


@pytest.mark.parametrize("options", [{}, {"mixing_kernel": (1, 3, 3)}], ids=["default", "mixing-1x3x3"])
def test_frozen_compiles(gpu_backend, options):
    """A frozen module is one graph too; the default one through the default compiler."""
    fast = pair(gpu_backend, SIZE[1], HALF, **options)[1].eval().freeze()
    x = randn(*SIZE, dtype=HALF)
    assert_close(torch.compile(fast, fullgraph=True, backend=compiler(not options))(x), fast(x))


@pytest.mark.parametrize("options", [{}, {"mixing_kernel": (1, 3, 3)}], ids=["default", "mixing-1x3x3"])
def test_opcheck_frozen(gpu_backend, options):
    """Schema, fake and dispatch of the frozen op, with and without a skip."""
    layer = pair(gpu_backend, SIZE[1], HALF, **options)[1].eval().freeze().layers[0]
    x = randn(*SIZE, dtype=HALF)
    for skip, taps in ((None, 1), (x, 0)):
        torch.library.opcheck(
            frozen_layer_op.overload, (x, None, skip, *layer.weights(), *layer.options(taps), gpu_backend)
        )


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_reduce_overhead(gpu_backend, train):
    """``mode="reduce-overhead"``: Inductor's own CUDA graphs hold our kernels, with the module's results."""
    if why_not("triton", HALF) is not None:
        pytest.skip("Inductor needs Triton")
    ref, fused = pair(gpu_backend, SIZE[1], HALF, num_layers=2, activation=None)
    fused.train(train)
    compiled = torch.compile(fused, fullgraph=True, mode="reduce-overhead")
    x = randn(*SIZE, dtype=HALF)
    for _ in range(4):  # the first runs, the second records, others replay
        torch.compiler.cudagraph_mark_step_begin()
        x, grad = randn(*SIZE, dtype=HALF), randn(*SIZE, dtype=HALF)
        if not train:
            with torch.no_grad():
                assert_close(compiled(x).clone(), fused(x), factor=2)
            continue
        draws = draws_for(ref, x, HALF)
        mine, theirs = training_step(compiled, x, draws, grad), training_step(fused, x, draws, grad)
        assert_close(mine[0].clone(), theirs[0], factor=2)
        for (name, gradient), mine_too in zip(theirs[2].items(), mine[2].values(), strict=True):
            assert_close(mine_too.clone(), gradient, name=name, factor=20)
