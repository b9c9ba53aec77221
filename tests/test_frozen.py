"""FrozenDSTS: the same answers as evaluation from packed weights alone, and a good citizen of torch."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from dsts_kernels import FrozenDSTS, FusedDSTS
from dsts_kernels.backends import BACKENDS, convolution, groups
from dsts_kernels.testing import assert_close

from .test_modules import OPTIONS, assert_same_routing, pair

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_reference(backend, options, dtype):
    """Output and routing of the literal module in evaluation, every option, every dtype."""
    ref, fused = pair(backend=backend, dtype=dtype, **options)
    x = torch.randn(5, 12, 3, 5, 4).to(dtype)
    theirs, their_routing = ref.eval()(x.double(), return_routing=True)
    fast = fused.eval().freeze()
    mine, routing = fast(x, return_routing=True)
    assert mine.dtype == dtype
    if dtype in (torch.float64, torch.float32):
        assert_same_routing(routing, their_routing, dtype)
        assert_close(mine, theirs)
    else:  # deeper layers see rounded features and may route otherwise; the first layer may not
        assert torch.equal(routing.neuron[0], their_routing.neuron[0])
        same = (routing.neuron == their_routing.neuron).all(0)
        assert_close(mine[same], theirs[same])


def test_freeze_to_half(backend):
    """A float32 module frozen to bfloat16 takes and returns bfloat16, and keeps scores in float32."""
    _, fused = pair(16, torch.float32, backend, num_layers=1)
    fast = fused.eval().freeze(dtype=torch.bfloat16)
    x = torch.randn(3, 16, 2, 5, 5).bfloat16()
    y, routing = fast(x, return_routing=True)
    assert y.dtype == torch.bfloat16 and routing.scores.dtype == torch.float32
    assert_close(y, fused(x.float()))


def test_memory_format_and_batch(backend):
    """Output lies in memory as the input does; samples do not depend on their batch."""
    _, fused = pair(8, backend=backend)
    for skip in (True, False):
        fused.skip = skip
        fast = fused.eval().freeze()
        x = torch.randn(5, 8, 3, 4, 5, dtype=torch.float64)
        for memory_format in (torch.contiguous_format, torch.channels_last_3d):
            y = fast(x.contiguous(memory_format=memory_format))
            assert y.is_contiguous(memory_format=memory_format)
            assert_close(y, torch.cat([fast(x[i : i + 1]) for i in range(5)]))


def test_a_large_batch_in_several_calls(backend, monkeypatch):
    """A batch on one neuron gives the same answers when it is cut into calls; so does the live module."""
    _, fused = pair(8, backend=backend, num_neurons=1, mixing_kernel=(1, 3, 3))
    x = torch.randn(5, 8, 3, 4, 5, dtype=torch.float64)
    whole = fused.eval()(x)
    monkeypatch.setattr(groups, "CALL_POSITIONS", 2 * 60)
    assert_close(fused(x), whole)
    assert_close(fused.freeze()(x), whole)


def test_strided_and_smallest_inputs(backend):
    """Slices, an empty batch, planes of one."""
    ref, fused = pair(6, backend=backend, scoring_kernel=(1, 3, 3))
    fast = fused.eval().freeze()
    ref.eval()
    x = torch.randn(4, 12, 3, 8, 5, dtype=torch.float64)[::2, ::2, :, ::2]
    assert_close(fast(x), ref(x))
    for size in ((0, 6, 2, 3, 3), (1, 6, 1, 1, 1), (2, 6, 4, 1, 3)):
        x = torch.randn(size, dtype=torch.float64)
        assert_close(fast(x), ref(x))


def test_samples_stay_apart(backend):
    """NaN in one sample leaves the others and the routing alone."""
    fast = FusedDSTS(6, num_neurons=2, backend=backend).eval().freeze()
    x = torch.randn(3, 6, 2, 5, 5)
    clean = fast(x)
    x[1] = float("nan")
    y, routing = fast(x, return_routing=True)
    assert_close(y[[0, 2]], clean[[0, 2]])
    assert ((routing.neuron >= 0) & (routing.neuron < 2)).all()


def test_one_gated_convolution_a_layer(backend, monkeypatch):
    """Mixing and norm are folded away: the taps of the open channels are all that is computed."""
    macs = []
    original = convolution.forward
    monkeypatch.setattr(
        convolution, "forward", lambda a, b, k: macs.append(a[..., 0].numel() * b.numel()) or original(a, b, k)
    )
    dsts = FusedDSTS(16, num_layers=1, num_neurons=3, backend=backend).eval()
    _, routing = dsts.freeze(algorithm="direct")(torch.randn(1, 16, 2, 4, 4), return_routing=True)
    spatial = int(routing.gate.sum())
    assert sum(macs) == (9 * spatial + 3 * (16 - spatial)) * 16 * 32


@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_algorithms_agree(backend, dtype, mixing_kernel):
    """Direct and fast convolution are the same layer; "auto" is fast where the backend is."""
    dsts = FusedDSTS(20, num_neurons=3, mixing_kernel=mixing_kernel, backend=backend).eval()
    x = torch.randn(3, 20, 4, 7, 9).to(dtype)
    results = {"auto": dsts.freeze(dtype=dtype)(x), "direct": dsts.freeze(dtype=dtype, algorithm="direct")(x)}
    if BACKENDS[backend].why_not_fast(x.device, dtype) is None:
        results["winograd"] = dsts.freeze(dtype=dtype, algorithm="winograd")(x)
        assert torch.equal(results["winograd"], results["auto"])
    else:
        assert torch.equal(results["direct"], results["auto"])
    assert_close(results["auto"], results["direct"], factor=2)


def test_packed_filters_run_anywhere(monkeypatch):
    """A module packed for fast convolution also runs on a backend that has none."""
    dsts = FusedDSTS(20, num_neurons=2, mixing_kernel=(3, 1, 1)).eval()
    fast, x = dsts.freeze(), torch.randn(2, 20, 4, 5, 5)
    wanted = fast(x)
    fast.backend = "eager"
    assert_close(fast(x), wanted)


def test_refuses_algorithms():
    """An unknown name, and fast convolution where there is none."""
    dsts = FusedDSTS(8, num_layers=1, num_neurons=2).eval()
    with pytest.raises(ValueError, match="algorithm: got 'fft', wanted 'auto' or 'direct' or 'winograd'"):
        dsts.freeze(algorithm="fft")
    with pytest.raises(ValueError, match=r"algorithm: got 'winograd', wanted 'auto' or 'direct' for torch.float64"):
        dsts.freeze(dtype=torch.float64, algorithm="winograd")
    with pytest.raises(ValueError, match="the 'eager' backend has none"):
        dsts.freeze(algorithm="winograd", backend="eager")


def test_is_independent_of_its_source():
    """Later changes of the source do not show, and only packed weights are held."""
    dsts = FusedDSTS(16, num_layers=1, num_neurons=3).eval()
    fast = dsts.freeze()
    x = torch.randn(2, 16, 2, 4, 4)
    before = fast(x)
    with torch.no_grad():
        for p in dsts.parameters():
            p.zero_()
    assert torch.equal(fast(x), before)
    assert not list(fast.parameters())
    weights = sum(b.numel() for name, b in fast.named_buffers() if name.endswith(".filters"))
    spatial = int(fast.layers[0].gate.sum())
    assert weights == (9 * spatial + 3 * (48 - spatial)) * 16


def test_copies(backend):
    """pickle, deepcopy, torch.save and a state_dict round trip all give the same answers."""
    fast = FusedDSTS(8, num_neurons=3, backend=backend).eval().freeze()
    x = torch.randn(2, 8, 2, 4, 4)
    y = fast(x)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        assert isinstance(other, FrozenDSTS) and torch.equal(other(x), y)
        other.load_state_dict(fast.state_dict())
        assert torch.equal(other(x), y)


def test_export():
    """torch.export keeps one op a layer, with a dynamic batch, and survives a save."""
    fast = FusedDSTS(8, num_neurons=3).eval().freeze()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fast, (torch.randn(3, 8, 2, 4, 4),), dynamic_shapes=({0: batch},))
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    assert sum("dsts_kernels.frozen_layer" in target for target in targets) == 3
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = torch.randn(5, 8, 2, 4, 4)
    assert torch.equal(torch.export.load(buffer).module()(x), fast(x))


def test_refuses_training():
    """Training mode is an error that says what to do; eval() is fine."""
    fast = FusedDSTS(4, num_neurons=2).eval().freeze()
    assert not fast.training and fast.eval() is fast
    with pytest.raises(RuntimeError, match=r"train\(mode\): got True, wanted False"):
        fast.train()
    assert not fast(torch.randn(1, 4, 2, 3, 3, requires_grad=True)).requires_grad


def test_opcheck(backend):
    """Schema, fake and dispatch of the frozen op."""
    from dsts_kernels.ops.frozen_layer import frozen_layer_op

    _, fused = pair(6, torch.float32, backend, mixing_kernel=(1, 3, 3))
    layer = fused.eval().freeze().layers[0]
    x = torch.randn(2, 6, 2, 4, 4)
    for skip, taps in ((None, 9), (x, 0)):
        torch.library.opcheck(
            frozen_layer_op.overload, (x, None, skip, *layer.weights(), *layer.options(taps), backend)
        )


def test_does_not_depend_on_threads():
    """A float32 module gives the same bits on any number of threads, routing included."""
    dsts = FusedDSTS(48, num_neurons=3).eval().freeze()
    x, before, found = torch.randn(3, 48, 8, 16, 16), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(dsts(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
