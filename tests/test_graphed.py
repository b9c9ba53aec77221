"""``graphed`` on a CPU, with graphs stood in for: the module's results, and errors instead of another's memory.

What it refuses from the start is in ``test_graphed_refused.py``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dsts_kernels import FusedDSTS, Routing, backends
from dsts_kernels import graphed as graphed_module
from dsts_kernels.ops import over_processes
from dsts_kernels.routing import sample_draws

from .learning.support import Net, batch, everything, learner, same
from .support.frozen import one_process
from .support.graphs import SIZE, draws, features, module, stand_in


@pytest.fixture
def graphs(monkeypatch):
    stand_in(monkeypatch)


def gradients(dsts: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in dsts.parameters() if p.grad is not None]


def passes(dsts: nn.Module, call: nn.Module, inputs: list[tuple]) -> list[Tensor]:
    """Output, routing, gradients and statistics of training steps, each with weights that the one before changed."""
    optimizer, found = torch.optim.SGD(dsts.parameters(), 0.1), []
    for x, drawn, grad in inputs:
        leaf = x.clone().requires_grad_()
        y, routing = call(leaf, drawn, return_routing=True)
        optimizer.zero_grad()
        ((y * grad).sum() + routing.scores.square().sum()).backward()
        found += [y.detach(), *(field.detach() for field in routing), leaf.grad, *gradients(dsts)]
        optimizer.step()
    return [*found, *dsts.buffers()]


@pytest.mark.parametrize("options", [{}, {"norm": None, "skip": False}, {"routing_gradient": "all"}], ids=str)
@pytest.mark.parametrize("static_output", [False, True])
def test_training_with_draws_given(graphs, options, static_output):
    """Step by step the bits of the module itself, kept results included."""
    plain = module(**options)
    mine = copy.deepcopy(plain)
    inputs = [(features(), draws(), features()) for _ in range(3)]
    graphed = mine.graphed(
        features(requires_grad=True), draws=draws(), return_routing=True, static_output=static_output
    )
    found, wanted = passes(mine, graphed, inputs), passes(plain, plain, inputs)
    if static_output:  # the last y alone is still there
        of_a_step = (len(wanted) - len(list(plain.buffers()))) // 3
        found[0], found[of_a_step] = wanted[0], wanted[of_a_step]
    assert same(found, wanted)
    assert len(graphed.phases) == 1


def test_training_draws_anew(graphs):
    """Each replay draws from torch's generator what the module would; capturing draws nothing."""
    plain = module()
    mine = copy.deepcopy(plain)
    x, before = features(), torch.get_rng_state()
    graphed = mine.graphed(x, return_routing=True)
    assert torch.equal(torch.get_rng_state(), before)
    for _ in range(2):
        torch.manual_seed(3)
        found = [graphed(x, return_routing=True) for _ in range(3)]
        torch.manual_seed(3)
        wanted = [plain(x, return_routing=True) for _ in range(3)]
        for (y, routing), (z, theirs) in zip(found, wanted, strict=True):
            assert torch.equal(y, z) and all(map(torch.equal, routing, theirs))
        assert not torch.equal(found[0][1].gate, found[1][1].gate)


def test_draws_before_the_graph(graphs):
    """Captured with draws and called without: drawn with the noise of that step, which a graph would not see."""
    plain = module()
    mine = copy.deepcopy(plain)
    x, graphed = features(), None
    graphed = mine.graphed(x, draws=draws())
    for std in (1.0, 0.25):
        for dsts in (plain, mine):
            for layer in dsts.layers:
                layer.noise_std = std
        torch.manual_seed(3)
        y = graphed(x)
        torch.manual_seed(3)
        assert torch.equal(y, plain(x))


def test_noise_that_falls_within_the_graph(graphs):
    """Graphs that draw by themselves follow the module's scales of noise, from one capture."""
    plain = module()
    mine = copy.deepcopy(plain)
    x = features()
    graphed = mine.graphed(x, return_routing=True)
    for std, scale in ((1.0, 1.0), (0.25, 0.5), (0.0, 0.0)):
        for dsts in (plain, mine):
            dsts.set_noise(noise_std=std, gumbel_scale=scale)
        torch.manual_seed(3)
        y, routing = graphed(x, return_routing=True)
        torch.manual_seed(3)
        z, theirs = plain(x, return_routing=True)
        assert torch.equal(y, z) and all(map(torch.equal, routing, theirs))
    assert len(graphed.phases) == 1


@pytest.mark.parametrize("in_training", [False, True])
def test_a_centre_within_the_graph(graphs, in_training):
    """Graphs move the buffer on, and read it in place."""
    plain = module(score_center=True, center_in_training=in_training)
    mine = copy.deepcopy(plain)
    inputs = [(features(), draws(), features()) for _ in range(3)]
    graphed = mine.graphed(features(requires_grad=True), draws=draws(), return_routing=True)
    assert same(passes(mine, graphed, inputs), passes(plain, plain, inputs))
    assert mine.layers[0].center_batches == 3 and mine.layers[0].center.count_nonzero()
    x = features()
    with torch.no_grad():
        assert torch.equal(mine.eval().graphed(x)(x), plain.eval()(x))


def test_capturing_asks_no_other_process(graphs, monkeypatch):
    """A phase may be met first within DDP's forward pass, where a pass would add up over processes."""

    def asked() -> None:
        raise AssertionError("another process was asked")

    dsts, x = module(score_center=True), features()
    with one_process():
        monkeypatch.setattr(over_processes, "group_of_pass", asked)
        dsts.graphed(x)
        with pytest.raises(AssertionError, match="another process was asked"):
            dsts(x)


def test_capturing_leaves_no_trace(graphs):
    """Statistics, generators, gradients and the sample are as they were."""
    dsts, x = module(), features(requires_grad=True)
    dsts(x).sum().backward()
    before = [*everything(dsts), *gradients(dsts), x.detach().clone(), x.grad.clone()]
    dsts.graphed(x)
    assert same(before, [*everything(dsts), *gradients(dsts), x.detach(), x.grad])


def test_a_capture_that_fails_leaves_no_trace(graphs, monkeypatch):
    """As one that runs out of memory after a warm-up pass: statistics as before, and no capture."""
    dsts, x = module(), features()
    graphed, before = dsts.graphed(x), [b.clone() for b in dsts.buffers()]

    def fail(run, sample_args, **options):
        run(*sample_args)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(torch.OutOfMemoryError):
        graphed(x.requires_grad_())
    assert same(list(dsts.buffers()), before) and len(graphed.phases) == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation(graphs, set_to_none):
    """Autograd keeps a first gradient in the graph's own memory: the next replay must not be added to itself."""
    plain = module()
    mine = copy.deepcopy(plain)
    graphed = mine.graphed(features(), draws=draws())
    for _ in range(3):
        inputs = [(features(), draws()) for _ in range(3)]
        for dsts, call in ((plain, plain), (mine, graphed)):
            dsts.zero_grad(set_to_none=set_to_none)
            for x, drawn in inputs:
                call(x, drawn).square().sum().backward()
        assert same(gradients(mine), gradients(plain))


def test_order_of_passes(graphs):
    """Two passes forward: the first one's activations are gone, and its backward says so; the second's goes on."""
    dsts, x = module(), features(requires_grad=True)
    graphed = dsts.graphed(x)
    first, second = graphed(x), graphed(x)
    with pytest.raises(RuntimeError, match=r"backward: got the graph's pass 1 after its pass 2 went forward, wanted"):
        first.sum().backward()
    assert all(p.grad is None for p in dsts.parameters())
    second.sum().backward()
    assert len(gradients(dsts)) == len(list(dsts.parameters()))


def test_a_pass_goes_backward_once(graphs):
    """The backward graph uses activations up: a second replay would give gradients of something else."""
    dsts, x = module(), features(requires_grad=True)
    y = dsts.graphed(x)(x)
    y.sum().backward(retain_graph=True)
    before = gradients(dsts)
    with pytest.raises(RuntimeError, match="backward: got the graph's pass 1 a second time, wanted each pass backward"):
        y.sum().backward()
    assert same(gradients(dsts), before)


def test_gradients_that_are_kept(graphs):
    """Of features, leaves or not, and of parameters: later passes leave them alone."""
    plain = module()
    mine = copy.deepcopy(plain)
    sample, first, second, drawn = features(requires_grad=True), features(), features(), draws()
    graphed, kept = mine.graphed(sample, draws=drawn), []
    for dsts, call in ((plain, plain), (mine, graphed)):
        leaf, inner = first.clone().requires_grad_(), first.clone().requires_grad_() * 2
        inner.retain_grad()
        for x in (leaf, inner):
            call(x, drawn).square().sum().backward()
        call(second.requires_grad_(), drawn)
        kept.append([leaf.grad, inner.grad, *gradients(dsts)])
    assert same(*kept)


@pytest.mark.parametrize("frozen", [False, True], ids=["fused", "frozen"])
def test_the_backend_of_its_size(graphs, monkeypatch, frozen):
    """What was measured faster by size is asked for the op and the features that will run."""
    asked, original = [], graphed_module.choose

    def spy(op, device, dtype, requested=None, size=None):
        asked.append((op, size))
        return original(op, device, dtype, requested, size)

    monkeypatch.setattr(graphed_module, "choose", spy)
    dsts = module().eval()
    dsts = dsts.freeze() if frozen else dsts
    dsts.graphed(features())(features())
    assert set(asked) == {("frozen_layer" if frozen else "gated_conv3d", torch.Size(SIZE))}


def test_precision_of_float32_products(graphs):
    """A graph holds the products that it was captured with; another precision is another phase."""
    dsts, x = module().eval(), features()
    graphed, before = dsts.graphed(x), torch.get_float32_matmul_precision()
    try:
        for precision, count in (("high", 2), ("highest", 2), ("high", 2)):
            torch.set_float32_matmul_precision(precision)
            graphed(x)
            assert len(graphed.phases) == count
    finally:
        torch.set_float32_matmul_precision(before)


def test_upstream_downstream(graphs):
    """In a model, by steps of Algorithm 1: the model's own steps, a capture for each side that is frozen."""
    net = Net(norm=None)
    mine = copy.deepcopy(net)
    steps = [(batch(4), batch(4)) for _ in range(3)]
    sample = torch.randn(4, 6, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    graphed = mine.dsts.graphed(sample, draws=sample_draws(4, 6, 3, 2, dtype=torch.float64))
    mine.dsts.forward = graphed
    ours, theirs = learner(mine, clip_norm=1.0), learner(net, clip_norm=1.0)
    for pair in steps:
        assert ours.step(*pair) == theirs.step(*pair)
    assert same(list(mine.parameters()), list(net.parameters()))
    trained = {phase.trained for phase in graphed.phases}
    assert len(graphed.phases) == 3 and len(trained) == 3, "all trained, of the sample; downstream; upstream"
    del mine.dsts.forward
    assert same(list(copy.deepcopy(mine).parameters()), list(net.parameters()))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
@pytest.mark.parametrize("frozen", [False, True], ids=["fused", "frozen"])
def test_evaluation(graphs, mode, frozen):
    """The module's results in every mode of autograd, which later calls leave alone; captured in another mode."""
    dsts = module().eval()
    dsts = dsts.freeze() if frozen else dsts
    inputs, graphed = [features() for _ in range(3)], dsts.graphed(features(), return_routing=True)
    with mode():
        found = [graphed(x, return_routing=True) for x in inputs]
        wanted = [dsts(x, return_routing=True) for x in inputs]
        again = graphed(inputs[0])
    for (y, routing), (z, theirs) in zip(found, wanted, strict=True):
        assert isinstance(routing, Routing)
        assert torch.equal(y, z) and all(map(torch.equal, routing, theirs))
        assert y.requires_grad == z.requires_grad
    assert torch.equal(again, found[0][0])


def test_training_and_evaluation_in_turns(graphs):
    """One object for both: each mode has its capture, and so has a norm that is kept in evaluation."""
    dsts = module(noise_std=0.0, hard_fraction=1.0)
    x, graphed = features(), dsts.graphed(features())
    for count, (change, wanted) in enumerate(((dsts.train, 1), (dsts.eval, 2), (dsts.train, 2)), 1):
        change()
        torch.manual_seed(count)
        y = graphed(x)
        torch.manual_seed(count)
        before = [b.clone() for b in dsts.buffers()]
        assert torch.equal(y, dsts(x)) and len(graphed.phases) == wanted
        for b, old in zip(dsts.buffers(), before, strict=True):
            b.copy_(old)
    dsts.layers[0].norm.eval()
    graphed(x)
    assert len(graphed.phases) == 3


def test_static_output(graphs):
    """The graph's own memory, by request; a copy else, which in-place changes leave the graph out of."""
    dsts = module(skip=False, norm=None)
    x, sample = (features().contiguous(memory_format=torch.channels_last_3d) for _ in range(2))  # or y is a copy anyway
    static = dsts.graphed(sample, static_output=True, draws=draws())
    drawn = draws()
    first, second = static(x, drawn), static(-x, drawn)
    assert first.data_ptr() == second.data_ptr()
    for graphed in (static, dsts.graphed(sample, draws=draws())):
        dsts.zero_grad()
        graphed(x, drawn).neg_().sum().backward()  # a ReLU keeps where its result is positive
        mine = gradients(dsts)
        dsts.zero_grad()
        dsts(x, drawn).neg().sum().backward()
        assert same(mine, gradients(dsts))


def test_autocast(graphs):
    """Captured as the call is: in autocast's dtype, and in the module's without it."""
    dsts = FusedDSTS(6, num_layers=2, num_neurons=3).eval()
    x = torch.randn(SIZE)
    graphed = dsts.graphed(x)
    with torch.no_grad():
        for enabled in (False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                assert torch.equal(graphed(x), dsts(x))
    assert [phase.autocast for phase in graphed.phases] == [None, None, torch.bfloat16]


def test_weights_in_place(graphs):
    """Loaded, stepped or written in place they are seen; moved or put in place of others they are an error."""
    dsts, x = module().eval(), features()
    graphed = dsts.graphed(x)
    dsts.load_state_dict(module().state_dict())
    assert torch.equal(graphed(x), dsts(x))
    wanted = r"module: its weights were moved or put in place of others since the capture; graphed\(sample\) again"
    for change in (
        lambda: dsts.load_state_dict(module().state_dict(), assign=True),
        lambda: setattr(dsts.layers[1], "gate", nn.Parameter(dsts.layers[1].gate.clone())),
        lambda: setattr(dsts.layers[0].norm, "running_var", dsts.layers[0].norm.running_var.clone()),
        lambda: dsts.float().double(),
    ):
        graphed = dsts.graphed(x)
        kept = list(dsts.state_dict().values())  # or memory comes back at the same place
        change()
        with pytest.raises(RuntimeError, match=wanted):
            graphed(x)
        assert kept


def test_frozen_weights(graphs):
    """A state of the same gates is taken in place; one of other gates is another module's."""
    dsts = module().eval()
    fast, x = dsts.freeze(), features()
    graphed = fast.graphed(x)
    with torch.no_grad():
        dsts.layers[0].mixing.mul_(2)
    fast.load_state_dict(dsts.freeze().state_dict())
    assert torch.equal(graphed(x), fast(x))
    with torch.no_grad():
        dsts.layers[0].gate.neg_()
    kept = [t for layer in fast.layers for t in layer.weights()]
    fast.load_state_dict(dsts.freeze().state_dict())
    with pytest.raises(RuntimeError, match="its weights were moved or put in place of others"):
        graphed(x)
    assert kept


def test_frozen_module_that_ran_by_itself(graphs):
    """What a backend keeps of its weights from that call on is no option of it."""
    fast, x = module().eval().float().freeze(), features().float()
    graphed = fast.graphed(x)
    with torch.no_grad():
        assert torch.equal(fast(x), graphed(x))
        assert torch.equal(fast(x), graphed(x))
    assert fast.layers[0].prepared is not None or backends.choose("frozen_layer", x.device, x.dtype).name != "cpu"


@pytest.mark.parametrize(
    "name, value, of",
    [
        ("hard_fraction", 0.25, "layers.0"),
        ("gumbel_tau", 2.0, "layers.1"),
        ("activation", None, "layers.1"),
        ("score_reduction", "mean", "layers.0"),
        ("routing_gradient", "all", "layers.0"),
        ("momentum", 0.5, "layers.1.norm"),
        ("skip", False, ""),
    ],
)
def test_changed_options(graphs, name, value, of):
    """A number that the graph was captured with, changed afterwards."""
    dsts, x = module(), features()
    graphed = dsts.graphed(x)
    part = dsts.get_submodule(of)
    old = getattr(part, name)
    setattr(part, name, value)
    with pytest.raises(RuntimeError, match=rf"^{name}: got {value!r}, wanted {old!r}, which the graphs hold"):
        graphed(x)
    setattr(part, name, old)
    graphed(x)
