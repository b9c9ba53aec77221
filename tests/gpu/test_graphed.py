"""``graphed`` on the device: the module's bits in training and evaluation, draws that are new in every replay."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

from dsts_kernels import FusedDSTS
from dsts_kernels.learning import UpstreamDownstream
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close
from tests.learning.support import Net, learner

from .support import DEVICE, HALF, pair, randn

pytestmark = pytest.mark.gpu

SIZE = (6, 64, 3, 6, 5)
STEPS = 4


def features(**options: object) -> Tensor:
    return randn(*SIZE, dtype=HALF).contiguous(memory_format=torch.channels_last_3d).requires_grad_(bool(options))


def module(backend: str, **options: object) -> nn.Module:
    return pair(backend, SIZE[1], HALF, num_layers=2, **options)[1].train()


def step(dsts: nn.Module, call: object, x: Tensor, grad: Tensor, *draws: object) -> list[Tensor]:
    """Output, routing, every gradient, and statistics."""
    leaf = x.detach().requires_grad_()
    y, routing = call(leaf, *draws, return_routing=True)
    (y * grad).sum().backward()
    found = [y.detach(), *(field.detach() for field in routing), leaf.grad]
    return [*found, *(p.grad.clone() for p in dsts.parameters()), *(b.clone() for b in dsts.buffers())]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def differing(first: list[Tensor], second: list[Tensor]) -> list[tuple[int, float]]:
    """Which are not the same bits, and how far they are from each other."""
    pairs = enumerate(zip(first, second, strict=True))
    return [(i, float((a.double() - b.double()).abs().max())) for i, (a, b) in pairs if not torch.equal(a, b)]


@pytest.mark.parametrize("given", [False, True], ids=["drawn-in-the-graph", "draws-given"])
@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (3, 1, 1)], ids=str)
def test_training(gpu_backend, mixing_kernel, given):
    """Steps on fresh features, each with the weights of the last and the same seed: bit for bit the module's."""
    plain = module(gpu_backend, mixing_kernel=mixing_kernel)
    mine = copy.deepcopy(plain)
    drawn = [sample_draws(SIZE[0], SIZE[1], 4, 2, device=DEVICE) for _ in range(STEPS + 1)]
    graphed = mine.graphed(features(grad=True), draws=drawn[STEPS] if given else None, return_routing=True)
    inputs, gates = [(features(), features()) for _ in range(STEPS)], []
    for i, (x, grad) in enumerate(inputs):
        found = []
        for dsts, call in ((plain, plain), (mine, graphed)):
            torch.manual_seed(i // 2)  # twice the same: what is drawn hangs on the generator alone
            dsts.zero_grad()
            found.append(step(dsts, call, x, grad, *([drawn[i]] if given else [])))
            with torch.no_grad():
                for p in dsts.parameters():
                    p.sub_(p.grad, alpha=0.01)
        assert same(*found), i
        gates.append(found[0][3])
    assert not torch.equal(gates[1], gates[2])
    assert len(graphed.phases) == 1


def test_draws_are_fresh(gpu_backend):
    """Replays without a seed in between draw what the module would, one after the other."""
    plain = module(gpu_backend)
    mine, x = copy.deepcopy(plain), features()
    before = torch.cuda.get_rng_state()
    graphed = mine.graphed(x, return_routing=True)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    found = []
    for call in (plain, graphed):
        torch.manual_seed(5)
        found.append([call(x, return_routing=True)[1].gate.detach() for _ in range(3)])
    assert same(*found) and not torch.equal(found[1][0], found[1][1])


def test_gradient_accumulation(gpu_backend):
    """Gradients of three passes are added up, in memory that replays leave alone."""
    plain = module(gpu_backend)
    mine = copy.deepcopy(plain)
    graphed = mine.graphed(features())
    for set_to_none in (True, False):
        torch.manual_seed(7)
        inputs, found = [features() for _ in range(3)], []
        for dsts, call in ((plain, plain), (mine, graphed)):
            torch.manual_seed(9)
            dsts.zero_grad(set_to_none)
            for x in inputs:
                call(x).square().sum().backward()
            found.append([p.grad for p in dsts.parameters()])
        assert same(*found)


def test_a_pass_goes_backward_once(gpu_backend):
    """The backward graph has given its activations' memory away; gradients of the first time stay as they are."""
    dsts = module(gpu_backend)
    y = dsts.graphed(features())(features())
    y.sum().backward(retain_graph=True)
    before = [p.grad.clone() for p in dsts.parameters()]
    with pytest.raises(RuntimeError, match="backward: got the graph's pass 1 a second time"):
        y.sum().backward()
    assert same([p.grad for p in dsts.parameters()], before)


@pytest.mark.parametrize("frozen", [False, True], ids=["fused", "frozen"])
def test_evaluation(gpu_backend, frozen):
    """Features that choose other neurons, in both memory formats of the sample; results outlive later replays."""
    dsts = module(gpu_backend).eval()
    dsts = dsts.freeze() if frozen else dsts
    for memory_format in (torch.channels_last_3d, torch.contiguous_format):
        sample = features().contiguous(memory_format=memory_format)
        graphed = dsts.graphed(sample, return_routing=True)
        with torch.inference_mode():
            inputs = [scale * features().contiguous(memory_format=memory_format) for scale in (1.0, -1.0, 3.0)]
            found = [graphed(x, return_routing=True) for x in inputs]
            wanted = [dsts(x, return_routing=True) for x in inputs]
        for (y, routing), (z, theirs) in zip(found, wanted, strict=True):
            assert torch.equal(y, z) and same(list(routing), list(theirs))
            assert y.stride() == z.stride()


def test_upstream_downstream(gpu_backend):
    """Steps of Algorithm 1 with the module's passes in graphs: the losses without; a capture for each side."""
    net = Net(channels=16, dtype=torch.float32, norm=None).cuda()
    for layer in net.dsts.layers:
        layer.backend = gpu_backend
    mine = copy.deepcopy(net)
    sample = torch.randn(6, 16, 2, 8, 8, device=DEVICE).requires_grad_()
    graphed = mine.dsts.graphed(sample)
    mine.dsts.forward = graphed
    pairs = [(torch.randn(6, 3, 2, 8, 8, device=DEVICE), torch.arange(6, device=DEVICE) % 4) for _ in range(4)]
    results = []
    for one in (net, mine):
        torch.manual_seed(11)
        steps: UpstreamDownstream = learner(one)
        results.append([steps.step(*pair) for pair in (pairs[:2], pairs[2:])])
    for a, b in zip(*results, strict=True):
        assert_close(torch.tensor(a), torch.tensor(b), factor=10)
    assert len(graphed.phases) == 3


def test_autocast(gpu_backend):
    """A float32 module under autocast, forward and backward, in the order that mixed precision trains.

    Without autocast's cache, as in a graph: with it the features, a leaf here, are cast once, and the gradients of all
    that reads them are added up in the half type.
    """
    plain = pair(gpu_backend, SIZE[1], torch.float32, num_layers=2)[1].train()
    mine = copy.deepcopy(plain)
    x, grad = randn(*SIZE), randn(*SIZE)
    found = []
    with torch.autocast("cuda", HALF, cache_enabled=False):
        graphed = mine.graphed(x.clone().requires_grad_(), return_routing=True)
        for dsts, call in ((plain, plain), (mine, graphed)):
            torch.manual_seed(3)
            found.append(step(dsts, call, x, grad))
    assert differing(*found) == []


def test_a_lost_graph_is_not_destroyed_by_a_capture(gpu_backend):
    """Python collects cycles at any time, and CUDA forbids to destroy a graph while another one is captured."""
    lost = [torch.cuda.CUDAGraph()]
    with torch.cuda.graph(lost[0]):
        torch.zeros(1, device=DEVICE)
    lost.append(lost)
    dsts, sample, before = module(gpu_backend), features(), gc.get_threshold()
    del lost
    gc.set_threshold(1)
    try:
        dsts.graphed(sample)
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()


def test_after_a_capture_that_failed(gpu_backend, monkeypatch):
    """What a graph cannot hold is an error; draws and another capture go on."""
    dsts, forward = module(gpu_backend), FusedDSTS.forward

    def waits(self: nn.Module, x: Tensor, *rest: object) -> object:
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return forward(self, x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(FusedDSTS, "forward", waits)
        with pytest.raises(RuntimeError, match="captur"):
            dsts.graphed(features())
    assert gc.isenabled()
    assert len(torch.rand(3, device=DEVICE).unique()) == 3
    x = features()
    torch.manual_seed(1)
    wanted = dsts(x)
    graphed = dsts.graphed(x)
    torch.manual_seed(1)
    assert torch.equal(graphed(x), wanted)


def test_two_streams(gpu_backend):
    """Replayed on another stream than the capture's, in order with what that stream does."""
    dsts = module(gpu_backend).eval()
    graphed, stream = dsts.graphed(features()), torch.cuda.Stream()
    with torch.no_grad():
        inputs = [features() for _ in range(8)]
        wanted = [dsts(x) for x in inputs]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            found = [graphed(x) for x in inputs]
        torch.cuda.synchronize()
    assert same(found, wanted)


def test_plain_pytorch_is_refused():
    """It asks the device how samples group, which no graph holds."""
    dsts = pair("eager", 16, torch.float32)[1]
    with pytest.raises(RuntimeError, match="got the backend 'eager', which waits for the device"):
        dsts.graphed(randn(2, 16, 2, 4, 4))
